"""Methods that look before they choose, against dense attention: what does the looking cost, and what is left of the speed-up?

planning       the method's plan of one call: statistics of blocks, map, selection, lists
attention      the kernel that runs the plan
summaries      merging the summary rows of what was skipped, in a launch of their own
around         what a method does before and after its plan: reordering tokens of each head, answering some queries densely
of ideal       time of the fastest dense peer · density / time of planning and attention with the summary rows

Queries and keys are random: what is chosen means nothing here, only how long it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import peers
from benchmarks.timing import measure
from tilewise.kernels.attention.block_compensation import add_block_compensation
from tilewise.kernels.attention.dispatch import block_sparse_attention, choose_backend
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import Around, DynamicMethod, about_methods, make_method, method_class
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.runtime.sparse_call import run_planned


@dataclass(frozen=True)
class Row:
    """A method on one attention call."""

    grid: Grid
    heads: int
    method: str
    options: tuple[tuple[str, Any], ...]
    head_dim: int = 128

    @property
    def shape(self) -> str:
        return f"{self.grid}, {self.heads} heads × {self.head_dim}"

    @property
    def name(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options)
        return f"{self.method} on {self.shape}: {options}"


def _is_published_rule(name: str) -> bool:
    cls = method_class(name)
    return issubclass(cls, DensityMethod) and ".published." in cls.__module__


VARIANTS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("draft", (("density", 0.25),)),
    ("draft", (("density", 0.25), ("compensate", False))),
    ("draft", (("density", 0.1),)),
    ("draft", (("density", 0.25), ("refresh", 4), ("drift", None))),
    ("draft", (("density", 0.25), ("each", True))),
    ("draft", (("recall", 0.9),)),
    ("auto", (("density", 0.25),)),
    ("auto", (("density", 0.25), ("every", 1))),  # every call measures
    ("xattention", (("density", 0.25), ("compensate", False))),
)
# Rules from the literature: what they cost on the largest shape, with summary rows.
PUBLISHED: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    *((about.name, (("density", 0.25),)) for about in about_methods() if _is_published_rule(about.name)),
    ("sol", (("tau", 1.0),)),
    ("flexprefill", (("gamma", 0.9),)),
    ("svg2", (("density", 0.1),)),
    ("delta", (("every", 64),)),
)
SHAPES = ((Grid(30, 48, 80), 24), (Grid(21, 45, 80), 40), (Grid(21, 45, 80), 12))
# Where does looking first begin to pay? Frames of 45×80 tokens, from one on.
SHORT = [Row(Grid(frames, 45, 80), 24, *VARIANTS[0]) for frames in (1, 2, 3, 5, 9)]
ROWS = [
    *(Row(grid, heads, method, options) for grid, heads in SHAPES for method, options in VARIANTS),
    *SHORT,
    *(Row(*SHAPES[0], *published) for published in PUBLISHED),
]
TINY = [Row(Grid(3, 9, 12), 2, *variant, 64) for variant in (*VARIANTS, *PUBLISHED)]


def run_row(row: Row, device: torch.device, seconds: float, dense: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One row; ``dense`` keeps the dense peers' milliseconds by shape."""
    method = make_method(row.method, dict(row.options))
    assert isinstance(method, DynamicMethod)
    layout = method.layout(row.grid)
    assert layout is not None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, row.grid.tokens, row.heads, row.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    scale = row.head_dim**-0.5
    missing: dict[str, str] = {}
    if row.shape not in dense:
        found, missing = peers.dense_peers(device)
        dense[row.shape] = {}
        for name, prepare in found.items():
            if name == "sage":  # 8-bit: another precision
                continue
            try:
                dense[row.shape][name] = measure(prepare(q, k, v), device, seconds=seconds).median
            except Exception as error:
                missing[name] = peers.reason(error)
    memory: dict[str, Any] = {}
    calls = 0

    def plan() -> Any:
        nonlocal calls
        calls += 1
        return method.plan_call(layout, q, k, v, scale, memory, calls)

    planned = plan()
    around = planned.around or Around()
    inner = around.before((q, k, v))
    backend = choose_backend(*inner, planned.plan)

    def attend() -> Any:
        merged = planned.compensation is not None
        return block_sparse_attention(*inner, planned.plan, scale=scale, backend=backend, return_lse=merged)

    def merge(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        skipped = planned.compensation
        return add_block_compensation(
            inner[0], out, lse, skipped.key_mean, skipped.value_mean, skipped.bias, layout, scale
        )

    def everything() -> torch.Tensor:
        nonlocal planned
        planned = plan()
        return run_planned((q, k, v), planned, backend, layout, scale)

    ms = {
        "planning": measure(plan, device, seconds=seconds).median,
        "attention": measure(attend, device, seconds=seconds).median,
    }
    if planned.compensation is not None:
        out, lse = attend()
        ms["summaries"] = measure(lambda: merge(out, lse), device, seconds=seconds).median
    if planned.around is not None:
        done = torch.empty_like(q)
        ms["around"] = measure(
            lambda: (around.before((q, k, v)), around.after((q, k, v), done, scale)), device, seconds=seconds
        ).median
    timing = measure(everything, device, seconds=seconds)
    assert planned.plan.device_density is not None
    density = float(planned.plan.device_density)
    result = {
        "name": row.name,
        "tokens": row.grid.tokens,
        "tile": list(layout.tile),
        "density": density,
        "backend": backend.backend,
        **timing.to_dict(),
        "parts": ms,
        "dense": dense[row.shape],
        "over": {name: other / timing.median for name, other in dense[row.shape].items()},
        "missing": missing,
    }
    if dense[row.shape]:
        fastest = min(dense[row.shape].values())
        result["of_ideal"] = fastest * density / timing.median
        result["planning_share"] = ms["planning"] / fastest
    return result


def run(device: torch.device, seconds: float, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """One result a row."""
    dense: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for row in rows:
            yield run_row(row, device, seconds, dense)
