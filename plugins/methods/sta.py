"""``sta``: sliding tile attention (arXiv 2502.04507). Each tile of queries sees a window of whole tiles around it.

Counting the window in tiles, not tokens, is what makes the method fast: a key block is seen by all queries of a tile or by
none, so no block is computed only to be masked. At borders the window shifts inward and keeps its size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self, TypeAlias

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout, tile_counts
from tilewise.kernels.plans.tiling import window_work
from tilewise.kernels.plans.window import window_interval, window_plan
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.windows import WindowMethod

Triple: TypeAlias = tuple[int, int, int]
DEFAULT_WINDOW: Triple = (3, 3, 3)
WASTE = 1.08  # pairs computed ÷ pairs kept that a chosen tile may cost, where a tile near the wanted size allows it
MAX_BLOCKS = 12_288  # block maps are N × N: beyond this, building one takes gigabytes


@register
@dataclass(frozen=True)
class STA(WindowMethod):
    """Windows of whole tiles around each tile of queries.

    Args:
        window: window in tiles (t, h, w), each ≥ 1, odd or even; larger than the grid means the whole axis. Or one window
            a head, as a sequence of triples. Default (3, 3, 3), the paper's, unless ``density`` is given.
        tile: tile in tokens (t, h, w). Default: chosen for the grid, near the paper's (6, 8, 8) where the grid is large, and
            finer with ``density``, so that there are windows to pick from.
        density: instead of ``window``: pick the window that keeps at most this fraction of token pairs, in (0, 1]. What a stream
            keeps anyway, its sink and memory, counts.
        far, cell: what stands for the keys outside the window: see ``WindowMethod``.

    Raises:
        ConfigError: for values outside those ranges, or for both ``window`` and ``density``.
    """

    window: Triple | tuple[Triple, ...] | None = None
    tile: Triple | None = None
    density: float | None = None

    name: ClassVar[str] = "sta"
    source: ClassVar[str] = "sliding tile attention, arXiv 2502.04507"
    use: ClassVar[str] = "the fastest window; a far field brings it close to dense"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("window", "density"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None:
            object.__setattr__(self, "tile", tile := _triple("tile", self.tile, "tokens"))
            self.check_cell(tile)
        if self.density is not None:
            if self.window is not None:
                raise ConfigError("STA: give window or density, not both: density picks the window")
            if not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
                raise ConfigError(f"STA: density must be in (0, 1], got {self.density!r}")
        elif self.window is None:
            object.__setattr__(self, "window", DEFAULT_WINDOW)
        else:
            object.__setattr__(self, "window", _windows(self.window))

    def layout(self, grid: Grid) -> Layout:
        return self.with_cells(cached_layout(grid, self.tile or choose_tile(grid, 4 if self.density is None else 8)))

    def windows(self, layout: Layout) -> tuple[Triple, ...]:
        """One window that all heads share, or one a head."""
        if self.density is not None:
            return (choose_window(layout.grid.shape, layout.tile, self.density),)
        assert self.window is not None
        return self.window if isinstance(self.window[0], tuple) else (self.window,)

    def check(self, heads: int) -> None:
        windows = 1 if self.window is None or isinstance(self.window[0], int) else len(self.window)
        if windows not in (1, heads):
            raise ConfigError(f"STA: {windows} windows were given, but the layer has {heads} heads; give 1 or {heads}")

    def of_heads(self, heads: Sequence[int]) -> Self:
        windows = self._by_head()
        return self if windows is None else dataclasses.replace(self, window=tuple(windows[head] for head in heads))

    def head_costs(self) -> tuple[float, ...] | None:
        windows = self._by_head()
        return None if windows is None else tuple(float(math.prod(window)) for window in windows)

    def _by_head(self) -> tuple[Triple, ...] | None:
        if self.window is None or not isinstance(self.window[0], tuple) or len(self.window) == 1:
            return None
        return self.window

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        self.check(heads)
        if layout.blocks > MAX_BLOCKS:
            raise ConfigError(
                f"STA: tile {layout.tile} cuts the grid {layout.grid} into {layout.blocks} blocks, more than {MAX_BLOCKS}; "
                "give a larger tile, or make a smaller clip"
            )
        windows = self.windows(layout)
        # Heads with the same window share one set of lists.
        distinct = list(dict.fromkeys(windows))
        head_set = torch.tensor([distinct.index(w) for w in windows]) if len(distinct) > 1 else None
        return self.with_far(window_plan(layout, distinct, unit="tile", head_set=head_set, device=device), layout)

    def window_plan(self, keys: WindowKeys, heads: int, device: torch.device) -> BlockPlan:
        if self.density is None:
            return super().window_plan(keys, heads, device)
        layout = keys.layout
        whole = keys.kept * tile_counts(keys.chunk.grid.shape, keys.chunk.tile)[0]
        window = choose_window(layout.grid.shape, layout.tile, self.density, whole)
        return dataclasses.replace(self, density=None, window=window).window_plan(keys, heads, device)

    def describe(self, layout: Layout) -> dict[str, Any]:
        windows = self.windows(layout)
        return {"window": windows[0] if len(windows) == 1 else list(windows), **self.describe_far(layout)}


@lru_cache(maxsize=256)
def choose_tile(grid: Grid, across: int = 4) -> Triple:
    """A tile for a grid: near the paper's (6, 8, 8), smaller where the grid has fewer than 3 × across × across such tiles (a
    window must leave something out to mean anything), and such that blocks are well filled on this very grid.

    Well filled: on every window tried, a kernel computes at most ``WASTE`` times the pairs that the window keeps. Where tiles
    near the wanted size allow that, the nearest of them is taken; where none does, nearness is weighed against fill."""
    wanted = (min(6, -(-grid.t // 3)), min(8, -(-grid.h // across)), min(8, -(-grid.w // across)))

    def cost(tile: Triple) -> tuple[bool, float]:
        away = [abs(math.log(a / b)) for a, b in zip(tile, wanted, strict=True)]
        volume = abs(math.log(math.prod(tile) / math.prod(wanted)))
        near = 0.5 * volume + 0.1 * sum(away)
        # The window is chosen after the tile: border tiles weigh more the wider it is.
        waste = max(window_work(grid, tile, w, unit="tile").waste for w in (DEFAULT_WINDOW, (5, 5, 5), grid.shape))
        return (False, waste + near) if waste <= WASTE else (True, 1 / Layout(grid, tile).fill + near)

    t, h, w = (range(max(1, round(0.7 * a)), round(1.35 * a) + 1) for a in wanted)
    return min(itertools.product(t, h, w), key=cost)


def axis_density(length: int, size: int, window: int) -> float:
    """Fraction of the coordinate pairs of one axis that a window of tiles keeps. Densities of axes multiply."""
    count = -(-length // size)
    sizes = torch.full((count,), size, dtype=torch.float64)
    sizes[-1] = length - size * (count - 1)
    lo, hi = window_interval(torch.arange(count), count, window)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), sizes.cumsum(0)])
    return float((sizes * (total[hi] - total[lo])).sum()) / length**2


@lru_cache(maxsize=256)
def choose_window(shape: Triple, tile: Triple, density: float, whole: int = 0) -> Triple:
    """The window (in tiles) for a density: at most, and near, the one asked for. (1, 1, 1) if even that keeps more.

    whole: tiles at the begin of the time axis that are seen whole by all, for queries at its end. They count, so that a window
    has what they leave of the density.

    Only odd windows and whole axes come into question: they are centred, and an even window sees one tile more on one side.
    Among those, reach over time comes first and then an even reach over height and width: on the bundled demo model a window
    that is whole in time makes a smaller error at density 0.14 than one that is cut in time makes at 0.33.
    """
    counts = tile_counts(shape, tile)
    kept = [[axis_density(n, s, w) for w in range(1, c + 1)] for n, s, c in zip(shape, tile, counts, strict=True)]
    t, h, w = ([n for n in range(1, count + 1) if n % 2 or n == count] for count in counts)
    best, cheapest = (1, 1, 1), math.inf
    anyway = whole / counts[0]
    for window in itertools.product(t, h, w):
        over_t, over_h, over_w = (kept[axis][n - 1] for axis, n in enumerate(window))
        total = anyway + min(over_t, 1 - anyway) * over_h * over_w
        if total > density + 1e-9:
            continue
        # Distances as logarithms of ratios: density left unused, time left out, and unevenness over the frame.
        cost = 1.5 * math.log(density / total) - 2 * math.log(over_t) + 0.5 * abs(math.log(over_h / over_w))
        if cost < cheapest - 1e-9:
            best, cheapest = window, cost
    return best


def _triple(what: str, value: Any, unit: str) -> Triple:
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
        raise ConfigError(f"STA: {what} must be three whole numbers of at least 1, (t, h, w) in {unit}, got {value!r}")
    return (value[0], value[1], value[2])


def _windows(value: Any) -> Triple | tuple[Triple, ...]:
    """One triple, or a tuple of triples; JSON's lists are taken too."""
    if isinstance(value, Sequence) and value and all(isinstance(w, Sequence) for w in value):
        return tuple(_triple(f"window of head {head}", w, "tiles") for head, w in enumerate(value))
    return _triple("window", value, "tiles")
