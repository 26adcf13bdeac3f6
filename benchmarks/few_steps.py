"""``python -m benchmarks.few_steps``: what methods cost in quality where a clip has few steps.

Clips of the demo model with 4 and with 8 steps, the same prompts and noise as dense clips of as many steps: PSNR and SSIM to
them, and what the clip-content detector reads, against what it reads in the dense clips. The model was not distilled to
few steps: its own dense clips of 4 steps show less of what was asked for than those of 20. Compare the rows with each other.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import results
from benchmarks.header import header
from benchmarks.presets import quality
from benchmarks.quality import settings_of
from tilewise.plugins.presets import PRESETS

SECTION = "few steps"


def draft(density: float, *, compensate: bool = True, blocks: str = ":") -> dict[str, Any]:
    method = {"name": "draft", "density": density, "compensate": compensate}
    return {"method": method, "steps": (0.25, 1.0), "blocks": blocks}


CONFIGS: dict[str, dict[str, Any]] = {
    "draft 0.25, compensate=False": draft(0.25, compensate=False),
    "draft 0.25": draft(0.25),
    "draft 0.25, blocks 1:": draft(0.25, blocks="1:"),
    "draft 0.4": draft(0.4),
    "sta 0.4, half dense, blocks 1:": {
        "method": {"name": "sta", "density": 0.4}, "steps": (0.5, 1.0), "blocks": "1:",
    },
    **{name: dict(PRESETS[name]) for name in ("draft-quality", "auto-quality", "sta-quality", "draft-few-steps")},
    "dense, first-block": {"method": "dense", "cache": "first-block:threshold=0.1"},
    "dense, taylor": {"method": "dense", "cache": "taylor"},
}  # fmt: skip
"""What is measured, by name. Steps and blocks that stay dense are in 16 bits: 8 bits are for Hopper GPUs alone, and clips this
short are not computed in them."""


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    prompts: Annotated[int, typer.Option(help="clips of each row")] = 64,
    steps: Annotated[str, typer.Option(help="denoising steps, several with commas")] = "4,8",
    size: Annotated[int, typer.Option(help="pixels, height and width")] = 128,
    frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    seed: Annotated[int, typer.Option(help="of prompts and noise")] = 0,
    only: Annotated[str, typer.Option(help="regular expression: rows whose name it is found in")] = "",
    batch: Annotated[int, typer.Option(help="clips a pipeline call")] = 32,
    dtype: Annotated[str, typer.Option(help="of the demo model's denoiser")] = "float32",
    workers: Annotated[int, typer.Option(help="processes that share the device")] = 1,
    tiny: Annotated[bool, typer.Option(help="two short clips: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a row."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    chosen = {name: data for name, data in CONFIGS.items() if re.search(only, name)}
    if not chosen:
        raise typer.BadParameter(f"no row has {only!r} in its name")
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for count in map(int, steps.split(",")):
        settings = settings_of(prompts, count, size, frames, seed, dtype, batch, "the row's")
        if tiny:
            settings |= {"prompts": 2, "height": 64, "width": 64, "frames": 5}
        found = quality(chosen, settings, str(where), workers)
        missing += [f"{count} steps: {name}" for name in chosen if name not in found]
        rows += [
            {
                "name": f"{count} steps: {name}", "order": 100 * count + order, "steps": count, "what": name,
                "config": chosen.get(name), "settings": settings, **row,
            }
            for order, (name, row) in enumerate(found.items())
        ]  # fmt: skip
        result = {**header(where, "benchmarks.few_steps", sys.argv[1:], tiny), "sections": {SECTION: rows}}
        path = results.write(result, out)
    for row in rows:
        print(f"{row['name']}: {row['psnr']['mean']:.2f} dB, {row['scores']}")
    print(f"written: {path}")
    if missing:
        print(f"not measured: {', '.join(missing)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
