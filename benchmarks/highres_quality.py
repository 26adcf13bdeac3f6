"""What each way past the training size shows, on the bundled demo model (native 128²): counted by its clip-content detector.

    python -m benchmarks.highres_quality --sides 256,384 --prompts 64,16 --processes 12

The same prompts and noise for every variant. "one object": the detector counts what the prompt says, one. "everything": all that
the prompt says. "excess": repetition beyond the native stage's; "sharpness": against the native stage scaled up
(``tilewise.pipelines.quality.coherence``). "native" is that stage itself, scaled up: what two stages have to beat.

The second stage begins at half of the schedule, with the model's own shift: the paper's strength of 0.7 at a shift of 9 is a
noise level of 0.95, at which little of the native stage's layout is left for a model as small as this one. ``--strength`` and
``--flow-shift`` take the paper's, or others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

import tilewise
from benchmarks import results
from benchmarks.header import device_name, header
from benchmarks.quality import save

ALL, COND = {"guided": "all"}, {"guided": "cond"}
# name → options of the second stage; None: not by two stages.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "native, scaled up": None,
    "dense": None,
    "window alone": {"global_path": "none"},
    "window alone, a mean a tile": {"global_path": "none", "far": "tiles"},
    "window alone, cells": {"global_path": "none", "far": "cells"},
    "two paths, k=1": {"refresh": 1, **ALL},
    "two paths, k=2": {"refresh": 2, **ALL},
    "two paths, k=5": {"refresh": 5, **ALL},
    "two paths, k=2, prompt guided": {"refresh": 2, **COND},
    "two paths, k=5, prompt guided": {"refresh": 5, **COND},
    "two paths, k=5, prompt guided, cells": {"refresh": 5, **COND, "far": "cells"},
    "two paths, k=2, pooled": {"refresh": 2, **ALL, "global_path": "pooled"},
    "two paths, k=2, draft": {"refresh": 2, **ALL, "global_path": "draft"},
    "two paths, k=5, prompt guided, draft, int8": {
        "refresh": 5, **COND, "global_path": "draft", "precision": "int8",
    },
    "two paths, k=1, no temperature": {"refresh": 1, **ALL, "temperature": False},
    "two paths, k=1, strength 0.7, shift 9": {"refresh": 1, **ALL, "strength": 0.7, "flow_shift": 9.0},
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
ATTRIBUTES = ("count", "colour", "shape", "motion", "background")


def worker(job: dict[str, Any]) -> None:
    """The clips of one process, a line of JSON each on standard output."""
    from tilewise.pipelines.generation.generate import content_score, generate
    from tilewise.pipelines.generation.resolve import resolve_settings
    from tilewise.pipelines.highres.upscale import upscale_frames
    from tilewise.pipelines.loading.load import load_pipeline
    from tilewise.pipelines.quality.coherence import coherence
    from tilewise.pipelines.quality.content_detection import analyse

    torch.set_num_threads(job["threads"])
    pipe = load_pipeline("demo", device=job["device"], dtype=job["dtype"])
    longest = 0.0
    for side, number, prompt in job["clips"]:
        begin = time.time()
        if begin + longest > job["until"]:
            print(f"no time left for {side} {number:02d} and what follows", file=sys.stderr, flush=True)
            return
        lines: list[str] = []
        shared = {"steps": job["steps"], "frames": job["frames"], "seed": number}
        native = None
        for name in job["variants"]:
            options = VARIANTS[name]
            settings = resolve_settings(pipe, prompt, method="dense", height=side, width=side, **shared)
            if options is not None:
                second = {"strength": job["strength"], "flow_shift": job["flow_shift"], **options}
                made = tilewise.highres(pipe, prompt, height=side, width=side, **shared, **second)
                frames, seconds, native = made.frames, made.clip.seconds["denoise"], made.native.frames
            elif name == "dense":
                clip = generate(pipe, settings)
                frames, seconds = clip.frames, clip.seconds["denoise"]
            else:
                own = resolve_settings(pipe, prompt, method="dense", **shared)
                first = generate(pipe, own)
                native, seconds = first.frames, first.seconds["denoise"]
                scaled = upscale_frames(native / np.float32(255), side, side)
                frames = (scaled * 255).round().astype(np.uint8)
            assert native is not None, "the native stage comes first"
            content = content_score(pipe, settings, frames) or {}
            told = {
                "side": side, "number": number, "prompt": prompt, "variant": name, "seconds": seconds,
                "objects": analyse(frames).count, "content": {key: content.get(key) for key in ATTRIBUTES},
                **coherence(frames, native).to_dict(),
            }  # fmt: skip
            if job["pictures"]:
                middle = frames[len(frames) // 2]
                words = name.replace(", ", "-").replace(" ", "-").replace("=", "")
                Image.fromarray(middle).save(Path(job["pictures"]) / f"{side}-{number:02d}-{words}.png")
            lines.append(json.dumps(told))
            print(f"{side} {number:02d} {name}: {seconds:.1f} s, {told['objects']} objects", flush=True)
        part = part_of(Path(job["parts"]), job, side, number, prompt)
        save(part, lambda path, lines=lines: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        longest = max(longest, time.time() - begin)


def part_of(folder: Path, job: dict[str, Any], side: int, number: int, prompt: str) -> Path:
    """Where the lines of a clip lie, a line a variant; the name says what they were made with, and on what."""
    made_with = {key: job[key] for key in ("name", "dtype", "steps", "frames", "variants", "strength", "flow_shift")}
    key = hashlib.sha256(json.dumps([made_with, prompt, VARIANTS], sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{side}-{number:02d}-{key}.jsonl"


def summarised(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a side, with a row a variant in it."""
    rows = []
    for side in sorted({line["side"] for line in lines}):
        variants = []
        for name in VARIANTS:
            mine = [line for line in lines if line["side"] == side and line["variant"] == name]
            if not mine:
                continue
            shares = {
                key: _mean([line["content"][key] for line in mine if line["content"][key] is not None])
                for key in ATTRIBUTES
            }
            right = [all(v for v in line["content"].values() if v is not None) for line in mine]
            variants.append(
                {
                    "name": name, "clips": len(mine), **shares, "everything": _mean(right),
                    "objects": _mean([line["objects"] for line in mine]),
                    "excess": _mean([line["excess"] for line in mine]),
                    "sharpness": _mean([line["sharpness"] for line in mine if line["sharpness"] is not None]),
                    "seconds": statistics.median(line["seconds"] for line in mine),
                }
            )  # fmt: skip
        rows.append({"name": f"{side}×{side}", "order": side, "variants": variants})
    return rows


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row['name']}")
        lines.append(
            f"  {'':40}clips  one object  everything  objects  excess  sharpness  seconds (denoising, with others beside)"
        )
        for v in row["variants"]:
            count = "–" if v["count"] is None else f"{v['count']:.0%}"
            lines.append(
                f"  {v['name']:40}{v['clips']:5}{count:>12}{v['everything']:12.0%}{v['objects']:9.2f}{v['excess']:+8.3f}"
                f"{v['sharpness']:11.2f}{v['seconds']:9.2f}"
            )
    return "\n".join(lines)


def main(
    sides: Annotated[str, typer.Option(help="comma-separated heights and widths, pixels")] = "256,384",
    prompts: Annotated[str, typer.Option(help="how many prompts for each of them")] = "64,16",
    variants: Annotated[str, typer.Option(help="semicolon-separated names; default: all")] = "",
    steps: Annotated[int, typer.Option(help="denoising steps of both stages; 0: the model's own")] = 0,
    frames: Annotated[int, typer.Option(help="frames of a clip; 0: the model's own")] = 0,
    strength: Annotated[float, typer.Option(help="of the second stage")] = 0.5,
    flow_shift: Annotated[float, typer.Option(help="of the second stage; 0: the scheduler's own")] = 0.0,
    processes: Annotated[int, typer.Option(help="how many at once")] = 1,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one")] = "",
    dtype: Annotated[str, typer.Option(help="of the denoiser: auto, float32 or bfloat16")] = "auto",
    seconds: Annotated[float, typer.Option(help="begin no clip that would end later than this")] = 1e9,
    pictures: Annotated[Path | None, typer.Option(help="folder for the middle frame of every clip")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of result files; default: nothing is written")] = None,
) -> None:
    """Make the clips, judge them, print the table. With --out, run again to go on: each clip that is done is kept there."""
    from examples.train_demo_model.evaluation import held_out_prompts

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [name.strip() for name in variants.split(";")] if variants else list(VARIANTS)
    if unknown := set(chosen) - set(VARIANTS):
        raise typer.BadParameter(f"unknown variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")
    chosen = sorted(
        {*chosen, "native, scaled up"}, key=list(VARIANTS).index
    )  # first: the others are measured against it
    sizes = [int(word) for word in sides.split(",")]
    counts = [int(word) for word in prompts.split(",")]
    if len(sizes) != len(counts):
        raise typer.BadParameter(f"--sides has {len(sizes)} sizes, --prompts {len(counts)} counts")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    clips = []
    for side, count in zip(sizes, counts, strict=True):
        texts, _ = held_out_prompts(max(2, count), 0)
        clips += [(side, number, text) for number, text in enumerate(texts[:count])]
    clips.sort(key=lambda clip: -clip[0])  # the long ones first, dealt out evenly
    shared = {
        "device": where, "dtype": dtype, "steps": steps or None, "frames": frames or None, "variants": chosen,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // processes)),
        "pictures": str(pictures.resolve()) if pictures else "", "strength": strength, "flow_shift": flow_shift or None,
        "until": time.time() + seconds, "name": device_name(torch.device(where)),
    }  # fmt: skip
    with contextlib.nullcontext(out / "highres-parts") if out else tempfile.TemporaryDirectory() as parts:
        folder = Path(parts).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        files = {clip: part_of(folder, shared, *clip) for clip in clips}
        left = [clip for clip, path in files.items() if not path.exists()]
        _run([{**shared, "parts": str(folder), "clips": left[i::processes]} for i in range(min(processes, len(left)))])
        made = [path for path in files.values() if path.exists()]
        lines = [json.loads(line) for path in made for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        print("no clip was made in the time given")
        raise typer.Exit(1)
    rows = summarised(lines)
    print(table(rows))
    print(f"{len(made)} of {len(clips)} clips")
    if out is not None:
        print(f"written: {_write(rows, lines, where, out, sys.argv[1:])}")


def _run(jobs: list[dict[str, Any]]) -> None:
    """Every job in a process of its own, which keeps the lines of each clip; one alone in this process."""
    if len(jobs) == 1:
        worker(jobs[0])
        return
    command = [sys.executable, "-m", "benchmarks.highres_quality", "worker"]
    running = [subprocess.Popen([*command, json.dumps(job)], cwd=ROOT) for job in jobs]
    failed = [process.wait() for process in running]
    if any(failed):
        print(f"{sum(map(bool, failed))} of {len(jobs)} processes failed; the table has what was made", file=sys.stderr)


def _write(rows: list[dict[str, Any]], lines: list[dict[str, Any]], where: str, out: Path, words: list[str]) -> Path:
    result = header(torch.device(where), "benchmarks.highres_quality", words, False)
    path = results.write({**result, "sections": {"highres quality": rows}}, out)
    with path.with_name(path.stem + "-highres-clips.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        typer.run(main)
