"""``python -m benchmarks.quality``: what sparse methods cost in quality, on the demo model, clip by clip against dense.

``--table`` measures every method at equal kept pairs instead, between the best blocks and random ones (method_table.py).

Every variant makes the same clips as dense attention does: the same prompts, noise, steps and dense first quarter. A clip is
compared with its dense twin (PSNR, SSIM), and read by the clip-content detector. What needs a calibration gets one for its
density, on other prompts.

A variant at a density is a job. Several processes share the jobs of a run (the model is small, and keeps no GPU busy by
itself); each job that is done is kept in a folder, so that a run that ends early goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import tilewise
from benchmarks import results
from benchmarks.header import header
from benchmarks.method_table import beside_draft
from benchmarks.variants import CALIBRATED, OURS, PAPER, choice
from examples.train_demo_model.evaluation import generate_clips, held_out_prompts, judge, mean_scores
from tilewise.pipelines.calibration.calibrate import DENSITIES as MEASURED_DENSITIES
from tilewise.pipelines.calibration.calibrate import calibrate
from tilewise.pipelines.calibration.profile import profile_run
from tilewise.pipelines.calibration.records import Schedule
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.quality.metrics import psnr, ssim

SECTION = "quality"
SCHEDULE = (0.25, 1.0)  # sparse from a quarter of the steps on, as in the papers
CALIBRATION_PROMPTS, PARTS = 4, 6
MOST_DB = 99.0  # what equal clips count as


def settings_of(
    prompts: int, steps: int, size: int, frames: int, seed: int, dtype: str, batch: int, blocks: str
) -> dict[str, Any]:
    return {
        "prompts": prompts, "steps": steps, "height": size, "width": size, "frames": frames, "seed": seed,
        "guidance": 3.0, "dtype": dtype, "batch": batch, "blocks": blocks,
    }  # fmt: skip


def clips_of(pipe: Any, settings: dict[str, Any]) -> np.ndarray:
    """(prompts, frames, height, width, 3) uint8: the same for the same settings, whoever makes them."""
    texts, _ = held_out_prompts(settings["prompts"], settings["seed"])
    given = {key: settings[key] for key in ("steps", "guidance", "seed", "height", "width", "frames")}
    starts = range(0, len(texts), settings["batch"])
    parts = [
        generate_clips(pipe, texts[first : first + settings["batch"]], first=first, max_sequence_length=32, **given)
        for first in starts
    ]
    return np.concatenate(parts)


def compared(clips: np.ndarray, dense: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of a variant's clips beside the dense ones: mean, spread, worst, and each pair's."""
    texts, _ = held_out_prompts(settings["prompts"], settings["seed"])
    pairs = list(zip(clips, dense, strict=True))
    by_pair = {
        "psnr": [min(psnr(a, b), MOST_DB) for a, b in pairs],
        "ssim": [ssim(a, b) for a, b in pairs],
    }
    found: dict[str, Any] = {}
    for name, values in by_pair.items():
        found[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "pairs": [round(value, 4) for value in values],
        }
    rows = judge(texts, clips)
    found["scores"] = mean_scores([row["right"] for row in rows])
    found["everything"] = [all(right is not False for right in row["right"].values()) for row in rows]
    return found


def jobs(densities: list[float], pattern: str, table: bool = False) -> list[tuple[str, float]]:
    """(variant, density) in the order in which they are made: what matters most first."""
    names = [name for name in choice(table, SECTION).of(0.5) if re.search(pattern, name)]
    first = [name for name in (OURS, PAPER) if name in names]
    ordered = first + [name for name in names if name not in first]
    return [(name, density) for name in ordered for density in densities]


def row_name(settings: dict[str, Any], variant: str, density: float) -> str:
    size = f"{settings['height']}×{settings['width']}×{settings['frames']}"
    where = "" if settings["blocks"] == ":" else f", blocks {settings['blocks']}"
    return f"demo {size}{where}, density {density}: {variant}"


def part_of(folder: Path, settings: dict[str, Any], name: str) -> Path:
    """Where a job's result, or the dense clips, lie: the name says the settings too."""
    key = hashlib.sha256(json.dumps([settings, name], sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{key}"


def save(path: Path, write: Any) -> None:
    """A file under its name complete or not at all."""
    waiting = path.with_name(path.name + ".part")
    write(waiting)
    waiting.replace(path)


def make_dense(pipe: Any, folder: Path, settings: dict[str, Any]) -> Path:
    path = part_of(folder, settings, "dense").with_suffix(".npy")
    if not path.exists():
        clips = clips_of(pipe, settings)

        def write(waiting: Path) -> None:
            with waiting.open("wb") as file:
                np.save(file, clips)

        save(path, write)
    return path


def calibrated(pipe: Any, base: Any, settings: dict[str, Any], density: float) -> Any:
    """The method that keeps ``density`` of the pairs of the sparse steps, divided by a calibration on prompts that are not the
    clips'."""
    steps = settings["steps"]
    first = round(SCHEDULE[0] * steps)
    schedule = Schedule(steps, first, min(PARTS, steps - first))
    texts, _ = held_out_prompts(settings["prompts"], settings["seed"])
    others, _ = held_out_prompts(CALIBRATION_PROMPTS + len(texts), settings["seed"] + 1)
    runs = []
    for number, prompt in enumerate([text for text in others if text not in texts][:CALIBRATION_PROMPTS]):
        clip = {key: settings[key] for key in ("steps", "guidance", "height", "width", "frames")}
        asked = GenerateSettings(
            prompt=prompt, negative="", model="demo", method=tilewise.Config("dense"), seed=number, fps=8.0,
            max_sequence_length=32, **clip,
        )  # fmt: skip
        runs.append(profile_run(pipe, asked, base, MEASURED_DENSITIES, schedule))
    budget = (first + (steps - first) * density) / steps
    return calibrate(runs, base, schedule, budget=budget).config.method


def run_job(pipe: Any, dense: np.ndarray, settings: dict[str, Any], variant: str, density: float) -> dict[str, Any]:
    begin = time.perf_counter()
    method = choice("table" in settings, SECTION).of(density)[variant]
    if variant == CALIBRATED:
        method = calibrated(pipe, method, settings, density)
    tilewise.patch(pipe, method, steps=SCHEDULE, blocks=settings["blocks"], strict=True, fuse=False)
    try:
        clips = clips_of(pipe, settings)
        told = tilewise.summary(pipe)
    finally:
        tilewise.unpatch(pipe)
    return {
        "name": row_name(settings, variant, density),
        "variant": variant,
        "density_asked": density,
        "density": told.density,
        "cost": told.cost,
        "overall_density": told.overall_density,
        "recall": told.recall,
        "settings": settings,
        **compared(clips, dense, settings),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def worker(number: int, device: str, folder: Path, settings: dict[str, Any], todo: Any, until: float) -> None:
    """Take jobs until there are none, or no time is left for one as long as the longest so far."""
    torch.set_num_threads(1)
    pipe = load_pipeline("demo", device=device, dtype=settings["dtype"])
    dense = np.load(make_dense(pipe, folder, settings))
    longest = 0.0
    while True:
        begin = time.time()
        if begin + longest > until:
            print(f"worker {number}: no time left", flush=True)
            return
        try:
            variant, density = todo.get(timeout=1)
        except Exception:  # the queue is empty
            return
        row = run_job(pipe, dense, settings, variant, density)
        longest = max(longest, time.time() - begin)
        text = json.dumps(row)
        save(part_of(folder, settings, row["name"]).with_suffix(".json"), lambda path, text=text: path.write_text(text))
        print(f"{row['name']}: {in_short(row)}", flush=True)


def in_short(row: dict[str, Any]) -> str:
    shown = f"density {row['density']:.3f}, PSNR {row['psnr']['mean']:.2f} ± {row['psnr']['std']:.2f} dB"
    return f"{shown}, SSIM {row['ssim']['mean']:.4f}, everything right {row['scores']['everything']:.0%}, {row['seconds']} s"


def write_result(
    device: torch.device, section: str, rows: list[dict[str, Any]], tiny: bool, out: Path, program: str
) -> Path:
    """Put rows into this machine's result file of today."""
    result = {**header(device, program, sys.argv[1:], tiny), "sections": {section: rows}}
    return results.write(result, out)


def gain(rows: list[dict[str, Any]], density: float) -> str:
    """Ours against the paper's selection: mean of the pairs' differences, its standard error, and how many clips gain."""
    found = {row["variant"]: row["psnr"]["pairs"] for row in rows if row["density_asked"] == density}
    if OURS not in found or PAPER not in found:
        return ""
    more = [a - b for a, b in zip(found[OURS], found[PAPER], strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0
    won = sum(difference > 0 for difference in more)
    shown = f"{statistics.fmean(more):+.2f} ± {error:.2f} dB, better in {won} of {len(more)}"
    return f"density {density}: ours − paper's selection {shown}"


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    prompts: Annotated[int, typer.Option(help="clips of each variant")] = 32,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 20,
    size: Annotated[int, typer.Option(help="pixels, height and width")] = 128,
    frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    seed: Annotated[int, typer.Option(help="of prompts and noise")] = 0,
    densities: Annotated[str, typer.Option(help="comma-separated; default: those of the variants")] = "",
    only: Annotated[str, typer.Option(help="regular expression: variants whose name it is found in")] = "",
    batch: Annotated[int, typer.Option(help="clips a pipeline call")] = 32,
    dtype: Annotated[str, typer.Option(help="of the denoiser")] = "float32",
    blocks: Annotated[str, typer.Option(help="transformer blocks that are sparse, as for tilewise.patch")] = ":",
    workers: Annotated[int, typer.Option(help="processes that share the device")] = 1,
    seconds: Annotated[float, typer.Option(help="start no job that would end later than this")] = 1e9,
    table: Annotated[bool, typer.Option(help="the table of methods in place of the variants of ours")] = False,
    tiny: Annotated[bool, typer.Option(help="two short clips, four steps: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files; parts of a run are kept in it")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a variant. Run it again to go on."""
    begin = time.time()
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    settings = settings_of(prompts, steps, size, frames, seed, dtype, batch, blocks)
    if tiny:
        settings |= {"prompts": 2, "steps": 4, "height": 64, "width": 64, "frames": 5}
    if table:
        settings |= {"table": True}
    chosen = choice(table, SECTION)
    at = [float(x) for x in densities.split(",")] if densities else list(chosen.densities)
    wanted = jobs(at, only, table)
    if not wanted:
        raise typer.BadParameter(f"no variant has {only!r} in its name")
    folder = out / "quality-parts"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {job: part_of(folder, settings, row_name(settings, *job)).with_suffix(".json") for job in wanted}
    left = [job for job, path in parts.items() if not path.exists()]
    if left:
        processes = multiprocessing.get_context("spawn")
        todo = processes.Queue()
        for job in left:
            todo.put(job)
        until = begin + seconds
        if workers == 1:
            worker(0, str(where), folder, settings, todo, until)
        else:
            make_dense(load_pipeline("demo", device=str(where), dtype=dtype), folder, settings)
            running = [
                processes.Process(target=worker, args=(n, str(where), folder, settings, todo, until))
                for n in range(min(workers, len(left)))
            ]
            for process in running:
                process.start()
            for process in running:
                process.join()
            todo.cancel_join_thread()
    rows = []
    for order, path in enumerate(parts.values()):
        if path.exists():
            rows.append({**json.loads(path.read_text()), "order": order})
    if not rows:
        print("no job was done in the time given")
        raise typer.Exit(1)
    for row in rows:
        print(f"{row['name']}: {in_short(row)}")
    for density in sorted({row["density_asked"] for row in rows}, reverse=True):
        if text := gain(rows, density):
            print(text)
        print(*(beside_draft(rows, density) if table else ()), sep="\n")
    path = write_result(where, chosen.section, rows, tiny, out, "benchmarks.quality")
    print(f"{len(rows)} of {len(parts)} jobs; written: {path}; {time.time() - begin:.0f} s")


if __name__ == "__main__":
    typer.run(main)
