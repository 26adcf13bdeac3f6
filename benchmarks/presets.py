"""``python -m benchmarks.presets``: what each preset costs in quality, and what it gains in a whole clip.

Quality    clips of the demo model, the same prompts and noise as a dense clip each: PSNR and SSIM to it, and what the
           clip-content detector reads, against what it reads in the dense clips
Speed      denoising of a Wan2.1-14B 720×1280×81 clip: 50 steps of two forwards each. Forwards are measured on 10 of the 40
           layers with random weights, dense and sparse; a clip is dense and sparse steps, and dense and sparse blocks, as the
           preset has them:

               ms(step) = sparse · (1 − d) + dense · d        d: share of the blocks that stay dense
               clip     = 2 · 40/10 · Σ over steps of ms(step)

           once as the preset is, once with attention in int8, sparse and dense, and once with the linear layers in fp8 too
           (torchao): the stock clip beside them is the 16-bit one each time

``--candidates FILE`` measures other configs, a JSON object of them by name, beside the presets.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import tilewise
from benchmarks import results, step
from benchmarks.header import header
from benchmarks.layers import fp8_linears
from benchmarks.quality import clips_of, compared, settings_of
from benchmarks.timing import measure
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.plugins.config import select_blocks
from tilewise.plugins.presets import PRESETS
from tilewise.plugins.schedule.steps import runs_at

SECTION = "presets"
CLIP_STEPS, FORWARDS, LAYERS = 50, 2, 40
SIZE = next(size for size in step.SIZES if size.model == "Wan2.1-14B, 10 layers")
CLIPS = {"clip": None, "clip_int8": "int8", "clip_int8_fp8": "int8"}  # a row's clips: the precision of attention
ON_UNETS = {"hidiffusion"}  # presets of models that are not measured here
_worker: dict[str, Any] = {}


def _begin(device: str, settings: dict[str, Any], dense: np.ndarray | None) -> None:
    torch.set_num_threads(1)
    _worker.update(pipe=load_pipeline("demo", device=device, dtype=settings["dtype"]), settings=settings, dense=dense)


def _dense() -> tuple[np.ndarray, float]:
    begin = time.perf_counter()
    return clips_of(_worker["pipe"], _worker["settings"]), time.perf_counter() - begin


def _quality(data: dict[str, Any]) -> dict[str, Any]:
    """Figures of one config's clips, or its error: the others of a long run are kept."""
    try:
        return _clips_under(data)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _clips_under(data: dict[str, Any]) -> dict[str, Any]:
    pipe, settings = _worker["pipe"], _worker["settings"]
    config = tilewise.Config.from_dict(data)
    if any(
        field.name == "min_tokens" for field in dataclasses.fields(config.method)
    ):  # the demo model's clips are short
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, min_tokens=0))
    tilewise.patch(pipe, config, strict=True, fuse=False, min_tokens=0)
    try:
        clips = clips_of(pipe, settings)
        told = tilewise.summary(pipe)
    finally:
        tilewise.unpatch(pipe)
    figures = {"density": told.density, "cost": told.cost, "overall_density": told.overall_density}
    return {**figures, **compared(clips, _worker["dense"], settings)}


def quality(configs: dict[str, Any], settings: dict[str, Any], device: str, workers: int) -> dict[str, dict[str, Any]]:
    """Figures of each config's clips by name, and of the dense ones under "dense"."""
    if workers == 1:  # in this process
        _begin(device, settings, None)
        dense, seconds = _dense()
        _worker["dense"] = dense
        return _by_name(configs, settings, dense, seconds, map(_quality, configs.values()))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin, (device, settings, None)) as pool:
        dense, seconds = pool.submit(_dense).result()
    with ProcessPoolExecutor(min(workers, len(configs)), context, _begin, (device, settings, dense)) as pool:
        return _by_name(configs, settings, dense, seconds, pool.map(_quality, configs.values()))


def _by_name(
    configs: dict[str, Any], settings: dict[str, Any], dense: np.ndarray, seconds: float, rows: Iterable[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``rows`` by the names of their configs behind the dense one, each told as soon as it is there; failed ones are left out."""
    print(f"dense clips: {seconds:.0f} s", flush=True)
    found = {"dense": {"density": 1.0, "cost": 1.0, "overall_density": 1.0, **compared(dense, dense, settings)}}
    for name, row in zip(configs, rows, strict=True):
        if "error" in row:
            print(f"{name} not measured: {row['error']}", flush=True)
            continue
        found[name] = row
        print(f"{name}: density {row['density']:.3f}, {row['psnr']['mean']:.2f} dB, {row['scores']}", flush=True)
    return found


class Forwards:
    """Milliseconds of a forward, measured once for each method."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        size = SIZE if device.type == "cuda" else step.TINY[0]
        model = step.build(step.CONFIGS[size.model], device, dtype)
        self.bench = step.Bench(size, model, device, seconds, "eager")
        self.linears = "16 bits"
        self.found: dict[str, tuple[float, float]] = {}

    def to_fp8(self) -> None:
        """From here on, forwards have fp8 linear layers."""
        fp8_linears(self.bench.model)
        self.linears = "fp8"

    def __call__(self, method: Any, precision: str | None, min_tokens: int | None = None) -> tuple[float, float]:
        """(ms, density) with a method at every block; method None: stock."""
        key = json.dumps(
            [None if method is None else tilewise.resolve(method).to_dict(), precision, min_tokens, self.linears]
        )
        if key not in self.found:
            bench = self.bench
            if method is not None:
                tilewise.patch(
                    bench.model, method, steps=(0, 1), strict=True, min_tokens=min_tokens,
                    precision=None if method == "dense" else precision, dense_precision=precision,
                )  # fmt: skip
            times = itertools.cycle(torch.linspace(999, 0, 48).tolist())
            together = getattr(method, "every", 1)  # what is measured once in some steps is part of their time

            def run() -> None:
                for timestep in itertools.islice(times, together):
                    bench.timestep = torch.tensor([timestep], device=bench.device)
                    bench.forward()

            try:
                timing = measure(run, bench.device, seconds=bench.seconds, flush=False)
                density = 1.0 if method is None else tilewise.summary(bench.model).density
            finally:
                if method is not None:
                    tilewise.unpatch(bench.model)
            self.found[key] = timing.median / together, density
        return self.found[key]


def clip_of(config: tilewise.Config, forwards: Forwards, stock: float, precision: str | None) -> dict[str, Any]:
    """Seconds of the denoising of a clip under a config, its attention in ``precision`` where the config names none; and of the
    stock clip, whose forward takes ``stock`` ms."""
    on_gpu = forwards.bench.device.type == "cuda"
    sparse_in, dense_in = (
        (config.precision or precision, config.dense_precision or precision) if on_gpu else (None, None)
    )
    dense, _ = forwards("dense", dense_in)
    sparse, density = forwards(config.method, sparse_in, None if on_gpu else 0)
    kept = 1 - len(select_blocks(config.blocks, LAYERS)) / LAYERS
    one = sparse * (1 - kept) + dense * kept
    sparse_steps = sum(runs_at(config.steps, number, CLIP_STEPS) for number in range(CLIP_STEPS))
    times = FORWARDS * LAYERS / len(forwards.bench.model.blocks) / 1000
    seconds = times * (sparse_steps * one + (CLIP_STEPS - sparse_steps) * dense)
    whole = times * CLIP_STEPS * stock
    return {
        "name": forwards.bench.size.name, "sparse_ms": sparse, "dense_ms": dense, "stock_ms": stock, "density": density,
        "sparse_steps": sparse_steps, "seconds": seconds, "stock_seconds": whole, "speedup": whole / seconds,
    }  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    prompts: Annotated[int, typer.Option(help="clips of each preset")] = 64,
    steps: Annotated[int, typer.Option(help="denoising steps of the demo model's clips")] = 20,
    size: Annotated[int, typer.Option(help="pixels, height and width")] = 128,
    frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    seed: Annotated[int, typer.Option(help="of prompts and noise")] = 0,
    only: Annotated[str, typer.Option(help="regular expression: presets whose name it is found in")] = "",
    candidates: Annotated[Path | None, typer.Option(help="JSON object of more configs by name")] = None,
    batch: Annotated[int, typer.Option(help="clips a pipeline call")] = 32,
    dtype: Annotated[str, typer.Option(help="of the demo model's denoiser")] = "float32",
    workers: Annotated[int, typer.Option(help="processes that share the device")] = 1,
    seconds: Annotated[float, typer.Option(help="of each measurement of a forward; 0: no speed")] = 1.0,
    tiny: Annotated[bool, typer.Option(help="two short clips, four steps: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file, print a line a preset."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    settings = settings_of(prompts, steps, size, frames, seed, dtype, batch, "the preset's")
    if tiny:
        settings |= {"prompts": 2, "steps": 4, "height": 64, "width": 64, "frames": 5}
    given = {**PRESETS, **(json.loads(candidates.read_text(encoding="utf-8")) if candidates else {})}
    chosen = {name: dict(data) for name, data in given.items() if re.search(only, name) and name not in ON_UNETS}
    if not chosen:
        raise typer.BadParameter(f"no preset has {only!r} in its name")
    configs = {name: tilewise.Config.from_dict(data) for name, data in chosen.items()}  # wrong ones, before any work
    found = quality(chosen, settings, str(where), workers)
    about = f"demo {settings['height']}×{settings['width']}×{settings['frames']}"
    rows = [
        {
            "name": f"{about}: {name}",
            "order": order,
            "preset": name,
            "config": chosen.get(name),
            "settings": settings,
            **dict.fromkeys(CLIPS),
        }
        | row
        for order, (name, row) in enumerate(found.items())
    ]
    result = {**header(where, "benchmarks.presets", sys.argv[1:], tiny), "sections": {SECTION: rows}}
    path = results.write(result, out)  # a run that is ended while forwards are measured keeps this
    missing = sorted(set(configs) - set(found))
    if seconds:
        forwards = Forwards(where, seconds)
        with torch.no_grad():
            stock, _ = forwards(None, None)
            for clip, precision in CLIPS.items() if where.type == "cuda" else [("clip", None)]:
                if clip == "clip_int8_fp8":
                    forwards.to_fp8()
                for row in rows[1:]:
                    row[clip] = clip_of(configs[row["preset"]], forwards, stock, precision)
                    results.write(result, out)
    for row in rows:
        clip = row["clip"]
        more = ", ".join(f"{key} {row[key]['speedup']:.2f} ×" for key in CLIPS if row[key])
        speed = f", density {clip['density']:.3f}: {more} a stock clip" if clip else ""
        print(f"{row['name']}: {row['psnr']['mean']:.2f} dB, {row['scores']}{speed}")
    print(f"written: {path}")
    if missing:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
