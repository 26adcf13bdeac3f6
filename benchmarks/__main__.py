"""``python -m benchmarks``: measure on this machine, write benchmarks/results/<device>-<date>.json, print the tables.

Every row is written as soon as it is measured. ``--only`` and ``--rows`` measure a part and keep the rest of the file.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import (
    attention,
    dynamic,
    families,
    far_field,
    fused,
    launch,
    render,
    results,
    rows,
    step,
    streaming,
    streaming_windows,
    vae,
)
from benchmarks.header import header

SECTIONS = {
    "attention": "attention kernels, ours and others'",
    "dynamic": "methods that look before they choose: planning, attention, summaries (GPU)",
    "far-field": "windows whose outside is seen as means, against the same windows alone (GPU)",
    "step": "whole denoiser forwards (GPU)",
    "families": "denoiser forwards of other families (GPU)",
    "fused": "the fused kernels around attention",
    "streaming": "chunks of a stream against a full KV cache, and end to end; windows of LTX-Video (GPU)",
    "vae": "Wan's VAE: a chunk of a clip decoded, and encoded (GPU)",
    "launch": "launch configurations of the Triton kernel (GPU)",
}
STEP_SECONDS = 4  # a forward takes as long as many kernels: times the seconds of a kernel
FAMILY_SECONDS = 2  # more rows, and the goals are far apart


def work(section: str, device: torch.device, tiny: bool) -> list[tuple[str, Any]]:
    """(name, what to run) for all rows of a section on this device."""
    on_gpu = device.type == "cuda"
    if section == "attention":
        chosen = rows.TINY_ROWS if tiny else rows.GPU_ROWS if on_gpu else rows.CPU_ROWS
        return [(row.name, row) for row in chosen]
    if section == "dynamic":
        calls = dynamic.TINY if tiny else dynamic.ROWS if on_gpu else []
        return [(row.name, row) for row in calls]
    if section == "far-field":
        windows = far_field.TINY if tiny else far_field.ROWS if on_gpu else []
        return [(row.name, row) for row in windows]
    if section == "step":
        sizes = step.TINY if tiny else step.SIZES if on_gpu else []
        return [(size.name, size) for size in sizes]
    if section == "families":
        works = families.TINY if tiny else families.WORKS if on_gpu else []
        return [(work.name, work) for work in works]
    if section == "fused":
        widths = fused.TINY if tiny else fused.SIZES if on_gpu else []
        return [(f"{size.name}: {op.name}", (size, op)) for size in widths for op in fused.OPERATIONS]
    if section == "streaming":
        chunks = streaming.TINY if tiny else streaming.WORKS if on_gpu else []
        windows = streaming_windows.TINY if tiny else streaming_windows.WORKS if on_gpu else []
        return [(stream.name, stream) for stream in (*chunks, *windows)]
    if section == "vae":
        clips = vae.TINY if tiny else vae.WORKS if on_gpu else []
        return [(clip.name, clip) for clip in clips]
    if not on_gpu:
        return []
    named = {row.name: row for row in (rows.TINY_ROWS if tiny else rows.GPU_ROWS)}
    picked = ["tiny STA"] if tiny else [f"STA 30×48×80, window (3,3,3){d}" for d in ("", ", head dim 64")]
    return [(name, named[name]) for name in picked]


def measured(
    section: str, items: list[Any], device: torch.device, seconds: float, backend: str, variants: str
) -> Iterator[dict]:
    if section == "attention":
        return attention.run(device, seconds, items, compiled=backend == "inductor")
    if section == "dynamic":
        return dynamic.run(device, seconds, items)
    if section == "far-field":
        return far_field.run(device, seconds, items)
    if section == "step":
        return step.run(device, seconds * STEP_SECONDS, items, backend, variants)
    if section == "families":
        return families.run(device, seconds * FAMILY_SECONDS, items)
    if section == "fused":
        return fused.run(device, seconds, items, backend)
    if section == "streaming":
        windows = [item for item in items if isinstance(item, streaming_windows.WindowWork)]
        chunks = [item for item in items if item not in windows]
        return itertools.chain(
            streaming.run(device, seconds * STEP_SECONDS, chunks), streaming_windows.run(device, windows)
        )
    if section == "vae":
        return vae.run(device, seconds * STEP_SECONDS, items)
    return launch.run(device, seconds / 2, items)


def in_short(row: dict[str, Any]) -> str:
    """A row in a line, for whoever waits."""
    timed = [*row.get("implementations", []), *row.get("variants", [])]
    parts = [row["name"], *(f"{r['name']} {r['ms']:.4g} ms" for r in timed)]
    return "; ".join([*parts, *(f"not run: {name}" for name in row.get("missing", {}))])


def main(
    only: Annotated[str, typer.Option(help="comma-separated sections: " + ", ".join(SECTIONS))] = ",".join(SECTIONS),
    rows_: Annotated[str, typer.Option("--rows", help="regular expression: only rows whose name it is found in")] = "",
    variants: Annotated[
        str, typer.Option(help="regular expression: of the section step, only these beside stock")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one")] = "",
    seconds: Annotated[
        float, typer.Option(help="time spent on each kernel measurement; on a forward, 4 times that")
    ] = 0.5,
    tiny: Annotated[
        bool, typer.Option(help="tiny inputs, in a file of their own: shows what runs on this machine")
    ] = False,
    compiler: Annotated[
        str, typer.Option(help="torch.compile's backend; 'eager' compiles nothing (for tests)")
    ] = "inductor",
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure on this machine, write a result file, print the tables."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        raise typer.BadParameter(f"unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    pattern = re.compile(rows_)
    todo: dict[str, dict[str, tuple[int, Any]]] = {}
    for section in chosen:
        found = enumerate(work(section, where, tiny))
        todo[section] = {name: (order, item) for order, (name, item) in found if pattern.search(name)}
    if not any(todo.values()):
        raise typer.BadParameter(f"no row of {only} on {where.type} has {rows_!r} in its name")
    result = header(where, "benchmarks", sys.argv[1:], tiny)
    path = results.path_of(result, out)
    done: dict[str, list[dict[str, Any]]] = {}
    wrong: list[str] = []
    for section, named in todo.items():
        begin = time.perf_counter()
        items = [item for _, item in named.values()]
        for row in measured(section, items, where, seconds, compiler, variants):
            row["order"] = named[row["name"]][0]
            part = {**result, "sections": {section: [row]}}
            path = results.write(part, out)
            print(f"{time.perf_counter() - begin:6.1f} s  {section}: {in_short(row)}", flush=True)
            wrong += [f"{row['name']}: {name}" for name in row.get("wrong", [])]
            done.setdefault(section, []).append(row)
    print(render.tables({**result, "sections": done}))
    print(f"written: {path}")
    if wrong:
        print("WRONG RESULTS: " + "; ".join(wrong), file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
