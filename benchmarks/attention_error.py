"""``python -m benchmarks.attention_error``: how far sparse attention is from dense on the demo model's own activations.

    error = |out − dense| / |dense|            per attention call, over all heads and tokens, in float32

Queries, keys and values of every block are taken from two steps of a dense run, conditional and unconditional, and each variant
answers the same calls. "Exact recall" is the attention mass that the plan keeps, measured on probe rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tilewise
from benchmarks import results
from benchmarks.quality import write_result
from benchmarks.variants import choice
from examples.train_demo_model.evaluation import held_out_prompts
from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.plugins.methods.base import DynamicMethod, Method, Planned
from tilewise.plugins.methods.dynamic.map_method import MapMethod
from tilewise.plugins.runtime.observers import ObservedCall
from tilewise.plugins.runtime.sparse_call import run_planned

SECTION = "attention error"
STEPS, TAKEN = 8, (2, 5)  # of a short run: the clip's layout is settled; its details are
PROBES = 64


class EnoughError(Exception):
    """The last step that is wanted has run."""


def activations(pipe: Any, size: int, frames: int, blocks: set[int] | None = None) -> tuple[Grid, list[ObservedCall]]:
    """Attention calls of a dense run, in raster order; with the grid that they are over."""
    calls: list[ObservedCall] = []
    tilewise.patch(pipe, "dense", fuse=False)
    step = pipe.transformer._tilewise.state

    def told(call: ObservedCall) -> None:
        if call.step in TAKEN and (blocks is None or call.block in blocks):
            calls.append(call)

    def step_end(_: Any, done: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if done >= max(TAKEN):
            raise EnoughError
        return tensors

    step.observers.append(told)
    texts, _ = held_out_prompts(1, 0)
    with contextlib.suppress(EnoughError):
        pipe(
            texts[0], height=size, width=size, num_frames=frames, num_inference_steps=STEPS, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0), max_sequence_length=32, callback_on_step_end=step_end,
        )  # fmt: skip
    grid = step.grid
    tilewise.unpatch(pipe)
    return grid, calls


def answer(method: Method, grid: Grid, call: ObservedCall) -> tuple[torch.Tensor, Planned, float]:
    """(output in raster order, plan, density) of a variant for one call."""
    layout = method.layout(grid)
    assert layout is not None
    there = layout.permutation.to(call.query.device)
    q, k, v = (x.float().index_select(1, there) for x in (call.query, call.key, call.value))
    scale = q.shape[-1] ** -0.5
    if isinstance(method, DynamicMethod):
        planned = method.plan_call(layout, q, k, v, scale, {}, 0)
        assert planned.plan.device_density is not None
        density = float(planned.plan.device_density)
    else:
        planned = Planned(method.plan(layout, q.shape[2], q.device))
        density = planned.plan.density
    out = run_planned((q, k, v), planned, choose_backend(q, k, v, planned.plan), layout, scale)
    return out.index_select(1, layout.inverse.to(out.device)), planned, density


def dense(call: ObservedCall) -> torch.Tensor:
    q, k, v = (x.float().transpose(1, 2) for x in (call.query, call.key, call.value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def measured(name: str, method: Method, grid: Grid, calls: list[ObservedCall], exact: list[torch.Tensor]) -> dict:
    """A variant over all calls: mean, spread and worst of its errors; density and recall."""
    begin = time.perf_counter()
    if isinstance(method, MapMethod):
        method = dataclasses.replace(method, probe=PROBES)
    errors, densities, probes, recalls = [], [], [], []
    for call, wanted in zip(calls, exact, strict=True):
        out, planned, density = answer(method, grid, call)
        errors.append(float((out - wanted).norm() / wanted.norm()))
        densities.append(density)
        if planned.probe is not None and planned.recall is not None:
            probes.append(float(planned.probe))
            recalls.append(float(planned.recall))
    return {
        "name": name,
        "calls": len(calls),
        "density": statistics.fmean(densities),
        "error": statistics.fmean(errors),
        "error_std": statistics.stdev(errors) if len(errors) > 1 else 0.0,
        "error_max": max(errors),
        "errors": [round(error, 6) for error in errors],
        "recall": statistics.fmean(probes) if probes else None,
        "recall_estimated": statistics.fmean(recalls) if recalls else None,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    sizes: Annotated[str, typer.Option(help="pixels, comma-separated")] = "256,512",
    frames: Annotated[int, typer.Option(help="frames of the clip")] = 17,
    densities: Annotated[str, typer.Option(help="comma-separated; default: those of the variants")] = "",
    blocks: Annotated[str, typer.Option(help="transformer blocks, comma-separated; all if empty")] = "",
    dtype: Annotated[str, typer.Option(help="of the denoiser")] = "float32",
    table: Annotated[bool, typer.Option(help="the table of methods in place of the variants of ours")] = False,
    tiny: Annotated[bool, typer.Option(help="one small size and block: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a variant; each is written as soon as it is measured."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline("demo", device=str(where), dtype=dtype)
    if tiny:
        sizes, frames, blocks = "64", 5, "4"
    path, order, variants = None, 0, choice(table, SECTION)
    with torch.inference_mode():
        for size in map(int, sizes.split(",")):
            chosen = {int(x) for x in blocks.split(",")} if blocks else None
            grid, calls = activations(pipe, size, frames, chosen)
            exact = [dense(call) for call in calls]
            for density in map(float, densities.split(",")) if densities else variants.densities:
                for variant, method in variants.of(density).items():
                    name = f"demo {size}×{size}×{frames}, density {density}: {variant}"
                    row = measured(name, method, grid, calls, exact)
                    row |= {"variant": variant, "density_asked": density, "grid": grid.shape, "order": order}
                    order += 1
                    path = write_result(where, variants.section, [row], tiny, out, "benchmarks.attention_error")
                    mass = "" if row["recall"] is None else f", recall {row['recall']:.3f}"
                    print(f"{name}: density {row['density']:.3f}, error {row['error']:.4f}{mass}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
