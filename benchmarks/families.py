"""One forward of denoisers of other families than Wan (that one is in ``step``): stock diffusers against the patched one.

Each at the size of a real call, with random weights: see ``family_inputs``. Stock runs with PyTorch's own choice of attention
and with cuDNN's; ours with a method on every layer and no dense step, and dense. Before anything of ours counts, a window that
holds everything must give stock's output: its difference from it stands beside what the measured window changes.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewise
from benchmarks.family_inputs import TINY, WORKS, Call, Work
from benchmarks.layers import shortened
from benchmarks.peers import reason
from benchmarks.timing import measure
from tilewise.plugins.config import MIN_MAP_TOKENS
from tilewise.plugins.models.common.registry import family_of

__all__ = ["TINY", "WORKS", "run"]

NATIVE, CUDNN, DENSE = "stock", "stock, cuDNN", "tilewise, dense"
EVERYTHING = (9999, 9999, 9999)  # tiles: the window is the whole grid
WRONG = {torch.bfloat16: 0.1, torch.float32: 1e-4}  # a larger difference from stock is no rounding
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
ELSEWHERE = "some calls ran elsewhere, as cuDNN does not take them: "


class Bench:
    """One row: a model with its inputs, stock's output, and what has been measured."""

    def __init__(self, work: Work, model: Any, device: torch.device, dtype: torch.dtype, seconds: float) -> None:
        self.work, self.model, self.device, self.dtype, self.seconds = work, model, device, dtype, seconds
        self.inputs = work.inputs(Call(device, dtype, work.size, work.text, model))
        self.stock: torch.Tensor | None = None
        self.grid = ""
        self.variants: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.wrong: list[str] = []

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**self.inputs, return_dict=False)[0]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def difference(self, out: torch.Tensor) -> float:
        """‖out − stock‖ / ‖stock‖."""
        assert self.stock is not None
        want = self.stock.float()
        return float((out.float() - want).norm() / want.norm())

    def variant(self, name: str, context: Callable[[], Any], kind: str) -> bool:
        """Warm up and time the forward within ``context()``; what fails is kept, by name. Whether it ran.

        kind: "stock" is what others are compared with (where it does not run, the next of stock's), "exact" must agree with
            it, "sparse" need not.
        """
        try:
            with context():
                begin = time.perf_counter()
                # All layers of a stack run the same kernels at the same sizes.
                with shortened(self.model, lambda _: 1):
                    self.forward()
                self.synchronize()
                facts: dict[str, Any] = {"name": name, "warmup_seconds": round(time.perf_counter() - begin, 1)}
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                last: list[torch.Tensor] = []

                def forward() -> None:
                    last[:] = []
                    last.append(self.forward())

                facts |= measure(forward, self.device, seconds=self.seconds, warmup=0, flush=False).to_dict()
                if self.device.type == "cuda":
                    facts["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
                facts |= self._facts_of_patch()
        except Exception as error:
            self.missing[name] = reason(error)
            return False
        if kind == "stock" or (self.stock is None and not tilewise.is_patched(self.model)):
            self.stock = last[0]
        elif self.stock is not None:
            facts["relative_error" if kind == "exact" else "window_changes"] = self.difference(last[0])
            if kind == "exact":
                self.check(name, facts["relative_error"])
        self.variants.append(facts)
        return True

    def check(self, name: str, error: float) -> None:
        if not error < WRONG[self.dtype]:
            self.wrong.append(f"{name}: difference from stock {error:.1e}")

    def full_window(self) -> float | None:
        """Difference from stock of the sparse kernel with a window that holds everything; None where it did not run."""
        name = "tilewise, full window"
        try:
            method = tilewise.STA(window=EVERYTHING, tile=self.work.method.tile)
            with strictly_patched(self.model, method):
                out = self.forward()
                density = tilewise.summary(self.model).density
        except Exception as error:
            self.missing[name] = reason(error)
            return None
        if self.stock is None:
            return None
        error = self.difference(out)
        self.check(name, error if density == 1.0 else float("nan"))
        return error

    def _facts_of_patch(self) -> dict[str, Any]:
        if not tilewise.is_patched(self.model):
            return {"density": 1.0}
        summary = tilewise.summary(self.model)
        self.grid = next(iter(summary.grids.values()))
        kinds = {f"{row.kind}, {row.backend}" if row.backend else row.kind: row.calls for row in summary.rows}
        facts: dict[str, Any] = {"density": summary.density, "overall_density": summary.overall_density, "calls": kinds}
        method = summary.method["method"]
        if method["name"] != "dense":
            facts["options"] = {k: v for k, v in method.items() if k != "name" and v is not None}
        return facts

    def result(self) -> dict[str, Any]:
        stock = {v["name"]: v["ms"] for v in self.variants if v["name"] in (NATIVE, CUDNN)}
        for variant in self.variants:
            variant["over"] = {name: ms / variant["ms"] for name, ms in stock.items()}
        return {
            "name": self.work.name,
            "model": self.work.model,
            "grid": self.grid,
            "layers": self.work.layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "variants": self.variants,
            "missing": self.missing,
            "wrong": self.wrong,
        }


def strictly_patched(model: Any, method: Any) -> contextlib.AbstractContextManager[Any]:
    """Every call sparse, or an error. UNets have layers too small to pay, which are left dense as users would leave them."""
    family = family_of(model)
    assert family is not None
    own_maps = any(layer.downsample is not None for layer in family.layers(model))
    least = MIN_MAP_TOKENS if own_maps else None
    return tilewise.patched(model, method, steps=(0, 1), strict=True, min_tokens=least)


def run_work(work: Work, model: Any, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """All variants of one row."""
    bench = Bench(work, model, device, dtype, seconds)

    def ours(method: Any) -> Callable[[], Any]:
        return lambda: strictly_patched(model, method)

    bench.variant(NATIVE, contextlib.nullcontext, "stock")
    # Around the call and not as a diffusers backend: some processors call PyTorch's attention without asking for one.
    if not bench.variant(CUDNN, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION), "exact") and device.type == "cuda":
        why = bench.missing.pop(CUDNN)
        if bench.variant(CUDNN, lambda: sdpa_kernel(CUDNN_FIRST, set_priority=True), "exact"):
            bench.missing["cuDNN alone"] = ELSEWHERE + why
    bench.variant(DENSE, ours("dense"), "exact")
    if bench.variant(f"tilewise, {title(work.method)}", ours(work.method), "sparse"):
        error = bench.full_window()
        if error is not None:
            bench.variants[-1]["relative_error"] = error
    return bench.result()


def title(method: tilewise.STA) -> str:
    """A method with its options, as rows name it."""
    if method.density is not None:
        return f"STA density {method.density:g}"
    window, tile = (str(x).replace(" ", "") for x in (method.window, method.tile))
    return f"STA window {window}" + (f" of tiles {tile}" if method.tile else "")


def run(device: torch.device, seconds: float, works: list[Work]) -> Iterator[dict[str, Any]]:
    """One result a row; a model is built once for the rows that follow each other."""
    model, built = None, None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for work in works:
        if work.key != built:
            model = None  # before the next one is made
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            model, built = work.build(device, dtype), work.key
        yield run_work(work, model, device, dtype, seconds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
