"""``python -m benchmarks.clips``: seconds of whole clips with a step cache, with sparse attention, with both, and in 8 bits.

Wan 2.1's published shapes with random weights: 1.3B at 480×832×81, and 14B at 720×1280×81, of which 10 of the 40 layers run. A
clip of 50 steps has two forwards a step, as with guidance; one of 4 steps has one, as models distilled to few steps.

Forwards are measured, and a clip is added up of them:

    clip = forwards a step · Σ over steps of ms(step)        ms: computed or reused by the cache, at a dense or a sparse step

A forward that a cache reuses is measured too, within the same hooks: ``taylor`` skips the attention of all layers, and
``first-block`` all blocks but the first. Which steps ``taylor`` reuses is its schedule. Those of ``first-block`` depend on the
activations, which random weights say nothing of: its rows suppose that every other step is reused, and say so. Both compute
anew where dense steps end. The VAE and the text encoder are left out.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tilewise
from benchmarks import results, step
from benchmarks.header import header
from tilewise.plugins.config import select_blocks
from tilewise.plugins.schedule.steps import runs_at
from tilewise.plugins.step_caches.forecast import PlannedStep, reused_steps
from tilewise.plugins.step_caches.options import step_cache

SECTION = "clips"
SIZES = [step.SIZES[0], step.SIZES[3]]
LAYERS = {"Wan2.1-14B, 10 layers": 40}  # of the published model, where some are left out
TAYLOR, FIRST_BLOCK = "taylor:cache_interval=3", "first-block"
REUSES_ALL = f"{FIRST_BLOCK}:threshold=1e9"  # as it is measured: every forward but the first is reused
CACHES = {
    None: "",
    TAYLOR: "taylor, a step in three computed",
    FIRST_BLOCK: "first-block, if every other step is reused",
}
CLIPS = {
    50: (2, "sta-balanced"),
    4: (1, "draft-few-steps"),
}  # steps → (forwards a step, preset where attention is sparse)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: whether attention is sparse, whether all of it is in 8 bits, and the step cache."""

    sparse: bool = False
    eight_bits: bool = False
    cache: str | None = None

    @property
    def name(self) -> str:
        words = ["sparse" if self.sparse else "dense", *(["int8"] if self.eight_bits else [])]
        return ", ".join([*words, *([CACHES[self.cache]] if self.cache else [])])


VARIANTS = [
    Variant(sparse, eight_bits, cache)
    for cache in CACHES
    for sparse, eight_bits in ((False, False), (True, False), (False, True), (True, True))
]


class Forwards:
    """Milliseconds of a forward of one model, computed and reused, measured once for each way to run it."""

    def __init__(self, size: step.Size, device: torch.device, seconds: float) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = step.build(step.CONFIGS[size.model], device, dtype)
        self.bench = step.Bench(size, model, device, seconds, "eager")
        self.layers = LAYERS.get(size.model, len(model.blocks))
        self.found: dict[str, dict[bool, float]] = {}

    def __call__(self, config: tilewise.Config | None) -> dict[bool, float]:
        """Whether a forward was reused → its ms, of all layers. config: runs everywhere; None: the stock denoiser."""
        key = "stock" if config is None else repr(config.to_dict())
        if key not in self.found:
            times: dict[bool, list[float]] = {}
            for reused, ms in self._timed(config):
                times.setdefault(reused, []).append(ms)
            more = self.layers / len(self.bench.model.blocks)
            alone = config is not None and config.step_cache is not None and config.step_cache.skips == "blocks"
            # One block runs in a forward whose blocks are skipped, however many there are.
            self.found[key] = {
                reused: statistics.median(ms) * (1 if reused and alone else more) for reused, ms in times.items()
            }
        return self.found[key]

    def _timed(self, config: tilewise.Config | None) -> Iterator[tuple[bool, float]]:
        """Forwards of one run, each timed, behind the first two."""
        bench = self.bench
        cache = None if config is None else config.step_cache
        if config is not None:
            tilewise.patch(bench.model, config)
        try:
            begin, seen = time.perf_counter(), 0
            for number, timestep in enumerate(torch.linspace(999, 1, 300).tolist()):
                bench.timestep = torch.tensor([timestep], device=bench.device)
                start = self._now()
                bench.forward()
                ms = 1000 * (self._now() - start)
                before, seen = seen, 0 if cache is None else tilewise.summary(bench.model).cache[0].reused
                if number >= 2:
                    yield seen > before, ms
                # With taylor, three that are computed and three that are reused.
                if number >= (3 if cache is None else 8) and time.perf_counter() - begin > bench.seconds:
                    break
        finally:
            if config is not None:
                tilewise.unpatch(bench.model)

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize(self.bench.device)
        return time.perf_counter()


def clip(variant: Variant, steps: int, forwards: Forwards) -> dict[str, Any]:
    """A row: seconds of the denoising, and what they were added up of."""
    each, preset = CLIPS[steps]
    chosen = tilewise.resolve(preset)
    on_gpu = forwards.bench.device.type == "cuda"
    bits = "int8" if variant.eight_bits and on_gpu else None
    least = None if on_gpu else 0  # a tiny size for a CPU has fewer tokens than methods run over

    def everywhere(method: Any, cache: str | None) -> tilewise.Config:
        config = tilewise.resolve(method, steps=(0.0, 1.0), blocks=":", precision=bits, min_tokens=least, cache=cache)
        return dataclasses.replace(config, dense_precision=bits)

    cached = {None: None, TAYLOR: TAYLOR, FIRST_BLOCK: REUSES_ALL}[variant.cache]
    dense, sparse = forwards(everywhere("dense", None))[False], 0.0
    reused = forwards(everywhere("dense", cached))[True] if cached else 0.0
    kept = 0.0
    if variant.sparse:
        sparse = forwards(everywhere(chosen.method, None))[False]
        kept = 1 - len(select_blocks(chosen.blocks, forwards.layers)) / forwards.layers
    at = [variant.sparse and runs_at(chosen.steps, number, steps) for number in range(steps)]
    skipped = _reused(variant.cache, at)
    border = at.index(True) if True in at else steps
    computed = [dense, sparse * (1 - kept) + dense * kept]
    ms = computed[0] * (border - skipped[0]) + computed[1] * (steps - border - skipped[1]) + reused * sum(skipped)
    stock = forwards(None)[False]
    seconds = each * ms / 1000
    return {
        "steps": steps, "what": variant.name, "preset": preset if variant.sparse else None, "cache": variant.cache,
        "eight_bits": bits, "dense_ms": dense, "sparse_ms": sparse or None, "reused_ms": reused or None,
        "stock_ms": stock, "dense_steps": border, "reused_steps": sum(skipped), "seconds": seconds,
        "stock_seconds": each * steps * stock / 1000, "speedup": steps * stock / ms,
    }  # fmt: skip


def _reused(cache: str | None, runs: list[bool]) -> tuple[int, int]:
    """Steps that a cache reuses among those where attention is dense, and sparse."""
    dense = runs.index(True) if True in runs else len(runs)
    if cache is None:
        return 0, 0
    if cache == FIRST_BLOCK:
        return dense // 2, (len(runs) - dense) // 2
    told = step_cache(cache)
    assert told is not None
    steps = [PlannedStep(number, len(runs), sparse) for number, sparse in enumerate(runs)]
    before, whole = (reused_steps(told, part) for part in (steps[:dense], steps))
    assert before is not None and whole is not None
    return before, whole - before


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[str, typer.Option(help="regular expression: rows whose name it is found in")] = "",
    seconds: Annotated[float, typer.Option(help="of each measurement of a forward")] = 0.3,
    tiny: Annotated[bool, typer.Option(help="a tiny model: shows that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of result files")] = results.FOLDER,
) -> None:
    """Measure, write the result file after each row, print a line a row."""
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    result = {**header(where, "benchmarks.clips", sys.argv[1:], tiny), "sections": {SECTION: rows}}
    path = results.path_of(result, out)
    for number, size in enumerate(step.TINY if tiny else SIZES):
        forwards = None
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
        model = f"{size.model.split(',')[0]} {size.pixels}"
        named = [(f"{model}, {steps} steps: {v.name}", steps, v) for steps in CLIPS for v in VARIANTS]
        for order, (name, steps, variant) in enumerate(named):
            if not re.search(only, name) or (variant.eight_bits and where.type != "cuda"):
                continue
            forwards = forwards or Forwards(size, where, seconds)
            row = clip(variant, steps, forwards)
            rows.append({"name": name, "order": 100 * number + order, "model": model, **row})
            path = results.write(result, out)
            print(f"{name}: {row['seconds']:.1f} s, {row['speedup']:.2f} × stock", flush=True)
    if not rows:
        raise typer.BadParameter(f"no row has {only!r} in its name, or all are in 8 bits, for which there is no GPU")
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
