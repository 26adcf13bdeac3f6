"""``python -m benchmarks.global_path``: what is lost where the full path looks less closely, on the demo model past its size.

    lost = |out − out_dense| / |out_dense|          of one forward's velocity; out_dense: with a dense full path

The model's own clips, scaled up, encoded and noised as the second stage begins with them, go through one forward each with every
kind of full path, and with none. The last says how much a full path decides at all.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import tilewise
from benchmarks import results
from benchmarks.header import header
from examples.train_demo_model.evaluation import held_out_prompts
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.highres.upscale import upscale_frames
from tilewise.pipelines.latent_spaces.base import latent_space
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of

SECTION = "global path"
# name → options of two_paths; None: the window path alone.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": {"global_path": "dense"},
    "draft": {"global_path": "draft"},
    "pooled, 2×2": {"global_path": "pooled", "pool": (2, 2)},
    "pooled, 4×4": {"global_path": "pooled", "pool": (4, 4)},
    "none": None,
}


def starts(pipe: Any, prompts: int, side: int, frames: int | None, steps: int | None) -> list[tuple[torch.Tensor, Any]]:
    """(clean latents at the target's size, text) of each prompt."""
    texts, _ = held_out_prompts(max(2, prompts), 0)
    found = []
    for number, text in enumerate(texts[:prompts]):
        settings = resolve_settings(pipe, text, method="dense", seed=number, frames=frames, steps=steps)
        clip = generate(pipe, settings)
        large = upscale_frames(clip.frames / np.float32(255), side, side)
        embeds, _ = pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=32, device=pipe.device
        )
        found.append((latent_space(pipe).encode(pipe, large), embeds))
    return found


def native_grid(pipe: Any, frames: int) -> Grid:
    settings = resolve_settings(pipe, "-", method="dense", frames=frames)
    family = family_of(pipe.transformer)
    assert family is not None
    return family.grid_of_size(pipe.transformer, pipe, Size(settings.height, settings.width, settings.frames))


def measured(pipe: Any, given: list[tuple[torch.Tensor, Any]], levels: list[float], native: Grid) -> dict[str, Any]:
    """Of every variant: lost, by clip and noise level."""
    model = pipe.transformer
    lost: dict[str, list[float]] = {name: [] for name in VARIANTS}
    tilewise.patch(model, tilewise.Inward((native.h, native.w)), steps=(0, 1), strict=True)
    try:
        for number, (clean, text) in enumerate(given):
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number)).to(clean)
            for sigma in levels:
                latents = ((1 - sigma) * clean + sigma * noise).to(model.dtype)
                timestep = torch.tensor([1000.0 * sigma], device=clean.device)
                reference = None
                for name, options in VARIANTS.items():
                    path = (
                        contextlib.nullcontext() if options is None else tilewise.two_paths(model, refresh=1, **options)
                    )
                    with torch.no_grad(), path:
                        out = model(latents, timestep, text.to(model.dtype), return_dict=False)[0].float().cpu()
                    reference = out if reference is None else reference
                    lost[name].append(float((out - reference).norm() / reference.norm()))
    finally:
        tilewise.unpatch(model)
    return {
        name: {"lost": statistics.fmean(each), "lost_max": max(each), "each": [round(x, 5) for x in each]}
        for name, each in lost.items()
    }


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    side: Annotated[int, typer.Option(help="pixels, height and width")] = 256,
    prompts: Annotated[int, typer.Option(help="clips")] = 4,
    levels: Annotated[str, typer.Option(help="noise levels σ, comma-separated")] = "0.5,0.3,0.15",
    frames: Annotated[int, typer.Option(help="frames of a clip; 0: the model's own")] = 0,
    steps: Annotated[int, typer.Option(help="denoising steps of the clips; 0: the model's own")] = 0,
    dtype: Annotated[str, typer.Option(help="of the denoiser")] = "float32",
    tiny: Annotated[bool, typer.Option(help="one short clip, one level: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a variant."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if tiny:
        side, prompts, levels, frames, steps = 160, 1, "0.5", 1, 2
    pipe = load_pipeline("demo", device=str(where), dtype=dtype)
    given = starts(pipe, prompts, side, frames or None, steps or None)
    found = measured(
        pipe, given, [float(x) for x in levels.split(",")], native_grid(pipe, frames or given[0][0].shape[2] * 2 - 1)
    )
    row = {"name": f"demo {side}×{side}", "order": side, "clips": len(given), "levels": levels, "paths": found}
    path = results.write(
        {**header(where, "benchmarks.global_path", sys.argv[1:], tiny), "sections": {SECTION: [row]}}, out
    )
    for name, values in found.items():
        print(f"{name}: {values['lost']:.4f}, at most {values['lost_max']:.4f}")
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
