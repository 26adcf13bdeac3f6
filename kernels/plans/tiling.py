"""Which tile makes a window cheap? Work is counted, not guessed: the same counts that a plan would have, without building it.

A kernel computes whole pairs of blocks, so its work is  listed pairs × block × block.  On one axis of length L cut into tiles
of s, query tile i lists the key tiles that meet the union of its queries' windows [lo, hi), and sees all of those that lie in
their intersection:

    any(i) = ⌈hi_last / s⌉ − ⌊lo_first / s⌋        all(i) = max(0, ⌊hi_first / s⌋ − ⌈lo_last / s⌉)      (⌊L / s⌋ counts up)

Axes are independent, so over the grid the counts multiply:  listed = Π Σ any,  full = Π Σ all.  One table an axis then prices
every tile in a few thousand multiplications (``choose_tile_for_window``). Windows counted in tiles (STA) have no partial
blocks; what they waste is the room that border tiles leave empty (``window_work(unit="tile")``).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, tile_counts

Triple: TypeAlias = tuple[int, int, int]

# What a partial block costs beside a full one: its scores are tested and masked. Measured weights belong here.
PARTIAL_COST = 1.15


@dataclass(frozen=True)
class WindowWork:
    """What one head of a window's plan costs and keeps, text included.

    Attributes:
        full, partial: listed pairs of blocks, without and with a test of coordinates.
        block: rows of room that a kernel gives a block: a power of two.
        kept: token pairs that the mask keeps.
        tokens: sequence length S.
    """

    full: int
    partial: int
    block: int
    kept: int
    tokens: int

    @property
    def work(self) -> float:
        """Token pairs computed ÷ all pairs: ``BlockPlan.work`` of the plan."""
        return (self.full + self.partial) * self.block**2 / self.tokens**2

    @property
    def density(self) -> float:
        """Token pairs kept ÷ all pairs: ``BlockPlan.density`` of the plan."""
        return self.kept / self.tokens**2

    @property
    def waste(self) -> float:
        """Pairs computed ÷ pairs kept, ≥ 1."""
        return self.work / self.density


def window_work(
    grid: Grid,
    tile: Triple,
    window: Triple,
    *,
    unit: Literal["tile", "token"],
    stride: Triple = (1, 1, 1),
    max_rows: int = MAX_BLOCK_ROWS,
) -> WindowWork:
    """The counts of ``window_plan(Layout(grid, tile, max_rows), [window], unit=unit, stride=stride)``, without building it.

    Args:
        tile: in tokens, clipped to the grid. For unit="token" its volume must be at most ``max_rows``.
        window, stride: in ``unit``, as in ``window_plan``.

    Raises:
        ValueError: for a token-exact window over tiles of several blocks, whose blocks are not boxes.
    """
    tile = _clip(tile, grid)
    if unit == "tile":
        return _tile_window_work(grid, tile, window, stride, max_rows)
    if math.prod(tile) > max_rows:
        raise ValueError(
            f"window_work: tile {tile} has {math.prod(tile)} tokens, more than one block of {max_rows}; "
            "count a token-exact window by building its plan"
        )
    axes = [_axis_counts(*of_axis)[size - 1] for *of_axis, size in zip(grid.shape, window, stride, tile, strict=True)]
    listed, full = math.prod(axis[0] for axis in axes), math.prod(axis[1] for axis in axes)
    kept = math.prod(length * min(w, length) for length, w in zip(grid.shape, window, strict=True))
    return _with_text(grid, listed, full, math.prod(tile_counts(grid.shape, tile)), math.prod(tile), kept, max_rows)


@lru_cache(maxsize=1024)
def choose_tile_for_window(
    grid: Grid,
    window: Triple,
    stride: Triple = (1, 1, 1),
    max_rows: int = MAX_BLOCK_ROWS,
    partial_cost: float = PARTIAL_COST,
) -> Triple:
    """The tile (t, h, w) of at most ``max_rows`` tokens on which a token-exact window costs a kernel least.

    Every tile is priced by its counts (``window_work``); a block costs ``max_rows`` rows however many it has, and a partial
    pair ``partial_cost`` full ones. Where a window spans all of t this puts t inside the tile by itself, so that blocks are
    small in h and w: at grid 21×68×120 and window 21×31×53, (21, 3, 2) computes 23 % of dense for a mask that keeps 20 %;
    raster order computes 48 %. Among equals the one with fewer blocks, then the more compact one, is taken.

    Args:
        window: in tokens; larger than the grid means the whole axis.
        stride: the window formula's stride, in tokens.
        max_rows: rows of a block: 16, 32, 64 or 128.
        partial_cost: cost of a partial pair of blocks in full ones, ≥ 1.

    Raises:
        ValueError: windows, strides or a cost below 1.
    """
    if min(window) < 1 or min(stride) < 1 or partial_cost < 1:
        raise ValueError(
            f"choose_tile_for_window: window {window}, stride {stride} and partial_cost {partial_cost} must be at least 1"
        )
    axes = [_axis_counts(*of_axis) for of_axis in zip(grid.shape, window, stride, strict=True)]
    text_blocks = math.ceil(grid.text / max_rows)
    best: tuple[float, int, int] | None = None
    chosen = (1, 1, 1)
    for t in range(1, min(len(axes[0]), max_rows) + 1):
        for h in range(1, min(len(axes[1]), max_rows // t) + 1):
            any_th = axes[0][t - 1][0] * axes[1][h - 1][0]
            all_th = axes[0][t - 1][1] * axes[1][h - 1][1]
            blocks_th = -(-grid.t // t) * -(-grid.h // h)
            for w in range(1, min(len(axes[2]), max_rows // (t * h)) + 1):
                any_w, all_w = axes[2][w - 1]
                full, listed = all_th * all_w, any_th * any_w
                blocks = blocks_th * -(-grid.w // w)
                price = full + partial_cost * (listed - full) + 2 * text_blocks * blocks
                key = (price, blocks, max(t, h, w))
                if best is None or key < best:
                    best, chosen = key, (t, h, w)
    return chosen


@lru_cache(maxsize=256)
def _axis_counts(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """For each tile size 1 … min(L, 128) of an axis: (Σ any, Σ all), pairs of tiles that meet and that see each other wholly."""
    window = min(window, length)
    lo = [_start(i, length, window, stride) for i in range(length)]
    counts = []
    for size in range(1, min(length, MAX_BLOCK_ROWS) + 1):
        meets = sees = 0
        for first in range(0, length, size):
            last = min(first + size, length) - 1
            # lo never falls along the axis: the first and last query of a tile bound all of them.
            meets += -(-(lo[last] + window) // size) - lo[first] // size
            hi_first = lo[first] + window
            end = -(-length // size) if hi_first == length else hi_first // size  # the border tile may be a short one
            sees += max(0, end - -(-lo[last] // size))
        counts.append((meets, sees))
    return counts


def _start(i: int, length: int, window: int, stride: int) -> int:
    """``window_start`` for one plain integer."""
    leader = min(i // stride * stride + stride // 2, length - 1)
    return max(0, min(leader - window // 2, length - window))


def _tile_window_work(grid: Grid, tile: Triple, window: Triple, stride: Triple, max_rows: int) -> WindowWork:
    """A window of whole tiles. Tiles differ only in whether they are short on an axis: up to 8 kinds, counted pair by pair."""
    pairs = []  # per axis: {(size of query tile, size of key tile): how often they see each other}
    for length, size, w, s in zip(grid.shape, tile, window, stride, strict=True):
        sizes = [min(size, length - first) for first in range(0, length, size)]
        w = min(w, len(sizes))
        seen: dict[tuple[int, int], int] = {}
        for i, rows in enumerate(sizes):
            lo = _start(i, len(sizes), w, s)
            border = sizes[-1] < size and lo + w == len(sizes)
            seen[rows, size] = seen.get((rows, size), 0) + w - border
            if border:
                seen[rows, sizes[-1]] = seen.get((rows, sizes[-1]), 0) + 1
        pairs.append(list(seen.items()))
    full = kept = 0
    for of_axes in itertools.product(*pairs):
        times = math.prod(count for _, count in of_axes)
        rows, keys = (math.prod(sizes[side] for sizes, _ in of_axes) for side in (0, 1))
        full += times * -(-rows // max_rows) * -(-keys // max_rows)
        kept += times * rows * keys
    blocks = 0
    for of_tile in itertools.product(*(_sizes(n, s) for n, s in zip(grid.shape, tile, strict=True))):
        blocks += math.prod(n for _, n in of_tile) * -(-math.prod(size for size, _ in of_tile) // max_rows)
    return _with_text(grid, full, full, blocks, math.prod(tile), kept, max_rows)


def _sizes(length: int, size: int) -> list[tuple[int, int]]:
    """(tile size, how many) along an axis."""
    return [(size, length // size)] + ([(length % size, 1)] if length % size else [])


def _with_text(grid: Grid, listed: int, full: int, blocks: int, volume: int, kept: int, max_rows: int) -> WindowWork:
    """Add the text blocks: each sees every block and is seen by every block."""
    text = math.ceil(grid.text / max_rows)
    rows = min(max_rows, max(volume, grid.text))
    with_text = 2 * blocks * text + text**2
    return WindowWork(
        full=full + with_text,
        partial=listed - full,
        block=max(16, 1 << (rows - 1).bit_length()),
        kept=kept + 2 * grid.video * grid.text + grid.text**2,
        tokens=grid.tokens,
    )


def _clip(tile: Triple, grid: Grid) -> Triple:
    t, h, w = (min(size, length) for size, length in zip(tile, grid.shape, strict=True))
    return (t, h, w)
