"""``power``: near tiles, and those a power of two away along an axis (PowerAttention, arXiv 2503.03588).

    tile a sees tile b    if |a − b| ≤ window ÷ 2 on every axis, or
                          if they differ on one axis alone, by 1, 2, 4, 8, …

In d layers a chain of such steps reaches tiles 2^d apart, while each tile sees about log₂ of each axis beside its window. The
paper has one axis, the tokens of a text, which look back; here each axis of the video has its own, in both directions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout, tile_counts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.options import fraction
from tilewise.plugins.methods.dynamic.tiles import default_tile
from tilewise.plugins.methods.windows import WindowMethod, triple

Triple = tuple[int, int, int]


@register
@dataclass(frozen=True)
class Power(WindowMethod):
    """Fixed pattern: a window, and the tiles a power of two away along each axis.

    Args:
        window: tiles (t, h, w), odd, around each tile that it sees. Default (1, 1, 1), its own, unless ``density`` is given.
        density: instead of ``window``: the window with which at most this fraction of token pairs is kept, in (0, 1]; the
            least if even that keeps more.
        tile: tokens (t, h, w) of a tile. Default: as of draft.

    Raises:
        ConfigError: for values that cannot be.
    """

    window: Triple | None = None
    density: float | None = None
    tile: Triple | None = None

    name: ClassVar[str] = "power"
    source: ClassVar[str] = "PowerAttention, arXiv 2503.03588"
    use: ClassVar[str] = "a fixed pattern that reaches far at a low density; deep models"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("window", "density"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.density is not None:
            raise ConfigError("power: give window or density, not both: density picks the window")
        if self.density is not None:
            fraction(self, "density")
        else:
            window = triple(self.name, "window", (1, 1, 1) if self.window is None else self.window)
            if any(n % 2 == 0 for n in window):
                raise ConfigError(
                    f"power: a window has as many tiles before as after its own: odd numbers, got {window}"
                )
            object.__setattr__(self, "window", window)
        if self.tile is not None:
            object.__setattr__(self, "tile", triple(self.name, "tile", self.tile))

    def layout(self, grid: Grid) -> Layout:
        return self.with_cells(cached_layout(grid, self.tile or default_tile(grid.shape)))

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        apart = (layout.block_tile[:, None] - layout.block_tile[None, :]).abs()  # (N, N, 3)
        half = torch.tensor(self.window_of(layout)) // 2
        near = (apart <= half).all(-1)
        steps = (apart > 0) & (apart & (apart - 1) == 0)
        far = steps.any(-1) & ((apart > 0).sum(-1) == 1)
        return self.with_far(plan_from_block_map(layout, (near | far)[None, None].to(device)), layout)

    def window_of(self, layout: Layout) -> Triple:
        """The window of a layout, in tiles."""
        if self.window is not None:
            return self.window
        assert self.density is not None
        return choose_window(layout.grid.shape, layout.tile, self.density)

    def describe(self, layout: Layout) -> dict[str, Any]:
        return {"window": self.window_of(layout), **self.describe_far(layout)}


@lru_cache(maxsize=256)
def choose_window(shape: Triple, tile: Triple, density: float) -> Triple:
    """The window (odd, in tiles) with which the pattern keeps most, but no more than the density; (1, 1, 1) if all keep more."""
    counts = tile_counts(shape, tile)
    shares = [
        [axis_shares(n, size, half) for half in range(count)]
        for n, size, count in zip(shape, tile, counts, strict=True)
    ]
    best, most = (1, 1, 1), 0.0
    for halves in itertools.product(*(range(count) for count in counts)):
        near, same, steps = zip(*(shares[axis][half] for axis, half in enumerate(halves)), strict=True)
        kept = math.prod(near) + sum(steps[axis] * math.prod(same) / same[axis] for axis in range(3))
        if most < kept <= density + 1e-9:
            best, most = (2 * halves[0] + 1, 2 * halves[1] + 1, 2 * halves[2] + 1), kept
    return best


def axis_shares(length: int, size: int, half: int) -> tuple[float, float, float]:
    """Of the coordinate pairs of an axis, those whose tiles are at most ``half`` apart, the same, and a power of two that is more
    than ``half`` apart."""
    rows = torch.full((-(-length // size),), size, dtype=torch.float64)
    rows[-1] = length - size * (len(rows) - 1)
    place = torch.arange(len(rows))
    apart = (place[:, None] - place[None, :]).abs()
    pairs = rows[:, None] * rows[None, :] / length**2
    steps = (apart > half) & (apart & (apart - 1) == 0)
    return float(pairs[apart <= half].sum()), float(pairs[apart == 0].sum()), float(pairs[steps].sum())
