"""Windows with a coarse far field against the same window without one: what do the means cost?

attention      the kernel that runs the window, which gives its log-sum-exp too
means          of keys and values over the cells
merge          the means into the softmax of what was seen, where the kernel that runs the window does not take them itself
two launches   attention, means and merge, by every kernel that there is
cost           pairs of the window and of queries and means ÷ all token pairs: over the density, what the ratio would be ideally
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.timing import measure
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.runtime.sparse_call import add_means, choose, far_means, run_plan, run_with_means


@dataclass(frozen=True)
class Row:
    """A window on one attention call."""

    grid: Grid
    heads: int
    tile: tuple[int, int, int]
    window: tuple[int, int, int] = (3, 3, 3)
    head_dim: int = 128
    precision: str | None = None  # of the products; None: 16 bits

    @property
    def name(self) -> str:
        what = f"STA {self.window} of {self.tile} on {self.grid}, {self.heads} heads × {self.head_dim}"
        return f"{what}, {self.precision}" if self.precision else what

    def methods(self) -> dict[str, STA]:
        window: dict[str, Any] = {"window": self.window, "tile": self.tile}
        return {
            "window alone": STA(**window),
            "a mean a tile": STA(**window, far="tiles"),
            "cells of 12 tokens": STA(**window, far="cells"),
        }


LONG = Row(Grid(30, 48, 80), 24, (6, 8, 8))
ROWS = [LONG, replace(LONG, precision="int8"), Row(Grid(21, 45, 80), 40, (3, 5, 8))]
TINY = [Row(Grid(6, 12, 12), 2, (3, 4, 4), (1, 1, 3), 64)]


def run_row(row: Row, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of the whole and of its parts, by far field."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, row.grid.tokens, row.heads, row.head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    variants = []
    for name, method in row.methods().items():
        layout = method.layout(row.grid)
        plan = method.plan(layout, row.heads, device)
        choice, _ = choose((q, k, v), plan, row.precision)
        far = plan.far is not None
        parts = {}

        def attend(plan: Any = plan, choice: Any = choice, far: bool = far) -> Any:
            return run_plan((q, k, v), plan, choice, None, return_lse=far)

        def everything(plan: Any = plan, choice: Any = choice, layout: Any = layout, far: bool = far) -> Any:
            return (
                run_with_means((q, k, v), plan, choice, layout, None)
                if far
                else run_plan((q, k, v), plan, choice, None)
            )

        def two_launches(plan: Any = plan, attend: Any = attend, layout: Any = layout) -> Any:
            means = far_means((q, k, v), plan)
            assert means is not None
            return add_means(q, *attend(), means, layout, None)

        if far:
            means, (out, lse) = far_means((q, k, v), plan), attend()
            assert means is not None
            parts = {
                "attention": measure(attend, device, seconds=seconds).median,
                "means": measure(lambda plan=plan: far_means((q, k, v), plan), device, seconds=seconds).median,
                "merge": measure(
                    lambda out=out, lse=lse, means=means, layout=layout: add_means(q, out, lse, means, layout, None),
                    device,
                    seconds=seconds,
                ).median,
                "two launches": measure(two_launches, device, seconds=seconds).median,
            }
        timing = measure(everything, device, seconds=seconds)
        variants.append(
            {
                "name": name,
                **timing.to_dict(),
                "density": plan.density,
                "cost": plan.cost,
                "backend": choice.backend,
                "parts": parts,
            }
        )
    return {"name": row.name, "tokens": row.grid.tokens, "variants": variants}


def run(device: torch.device, seconds: float, rows: list[Row]) -> Iterator[dict[str, Any]]:
    """One result a row."""
    with torch.no_grad():
        for row in rows:
            yield run_row(row, device, seconds)
