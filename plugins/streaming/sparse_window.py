"""Sparse attention of a chunk to the window of a KV cache: which methods run there, with which tile, and where the keys lie.

A static method plans for a grid of all frames of the window in the order of time: one plan for each turn of the ring, made once.
A dynamic one plans at each call. Memory and sink are seen whole. Chunks are stored in tile order, each by itself, so that the
blocks of a chunk stay together (kernels/plans/window_keys.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout, cached_layout, tile_counts
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.methods.base import DynamicMethod, Method
from tilewise.plugins.methods.dynamic.tiles import FEWEST_BLOCKS, SMALLEST_TILE
from tilewise.plugins.streaming.kv_cache import KVCache

Triple = tuple[int, int, int]


class SparseWindow:
    """See above.

    Args:
        method: of the patch. grid: of a chunk. cache, memory: frames of the window and before it.

    Attributes:
        reason: why calls over the window are dense; "" if they are not.
        layout: of a chunk.
    """

    def __init__(self, method: Method, grid: Grid, cache: KVCache, memory: int) -> None:
        self.method = method
        self.chunk = grid.t
        self.window = cache.window
        self.memory = memory
        self.sink = cache.sink
        self.layout: Layout | None = None
        self._keys: dict[tuple, WindowKeys] = {}
        self.reason = self._refusal(grid, cache)
        if not self.reason:
            self.layout = cached_layout(grid, self.tile)

    def _refusal(self, grid: Grid, cache: KVCache) -> str:
        for what, frames in (("window", cache.window), ("sink", cache.sink), ("memory", self.memory)):
            if frames % grid.t:
                return f"a {what} of {frames} latent frames is no multiple of a chunk of {grid.t}"
        dynamic = isinstance(self.method, DynamicMethod)
        if (refused := self.method.refuses_window()) is not None:
            return refused
        if getattr(self.method, "dilation", (1, 1, 1)) != (1, 1, 1):
            return f"dilated windows of {self.method.name} have a token order of their own"
        frames = cache.window + self.memory
        tile = getattr(self.method, "tile", None)
        self.tile: Triple = tile or choose_chunk_tile(grid.shape, FEWEST_BLOCKS * grid.t / frames if dynamic else 1)
        if grid.t % self.tile[0]:
            return (
                f"tiles of {self.tile[0]} latent frames do not divide a chunk of {grid.t}; give tile=({grid.t}, h, w)"
            )
        if isinstance(self.method, DynamicMethod):
            return self.method.refuses_call(cached_layout(Grid(frames, grid.h, grid.w), self.tile)) or ""
        return ""

    def turn(self, slots: Sequence[int]) -> tuple[int, ...]:
        """What of a turn of the ring matters to a plan. slots: where the window's frames stand, in the order of time; the chunk's
        own come last."""
        matters = not isinstance(self.method, DynamicMethod) or self.method.depends_on_time
        return tuple(slots) if matters else tuple(range(len(slots)))

    def keys(self, slots: Sequence[int], has_memory: bool) -> WindowKeys:
        """The keys of a window at a turn of the ring. slots: see ``turn``."""
        assert self.layout is not None
        turn, memory = self.turn(slots), self.memory // self.chunk if has_memory else 0
        found = self._keys.get((turn, memory))
        if found is None:
            # Chunks of the window in the order of time, by their place behind the memory.
            places = [memory + slot // self.chunk for slot in turn[:: self.chunk]]
            at = [*range(memory), *places]
            order = tuple(sorted(range(len(at)), key=at.__getitem__))
            kept = min(memory + self.sink // self.chunk, len(order))
            found = self._keys[turn, memory] = WindowKeys(self.layout, order, kept)
        return found

    @property
    def full(self) -> WindowKeys:
        """The keys of a full window, at the first turn of its ring."""
        return self.keys(range(self.window), self.memory > 0)

    def expected(self, heads: int) -> tuple[float, float]:
        """(kept, computed) ÷ all token pairs of a call over a full window, memory and sink included, as far as they are known
        before anything runs; nan where only a call decides."""
        assert self.layout is not None
        keys = self.full
        if isinstance(self.method, DynamicMethod):
            return self.method.expected_density(self.layout, heads, keys), math.nan
        device = torch.device("cpu")
        plan = self.method.window_plan(keys, heads, device)
        return plan.density, plan.work


def choose_chunk_tile(shape: Triple, fewest: float = 1) -> Triple:
    """A tile of a chunk (t, h, w): whole in time if that leaves room, near 128 tokens, such that blocks are well filled.

    fewest: blocks that a chunk should have at least; for fewer, tiles have half as many tokens, down to 16.
    """
    rows = MAX_BLOCK_ROWS
    while math.prod(shape) < fewest * rows and rows > SMALLEST_TILE:
        rows //= 2
    frames, height, width = shape

    def cost(tile: Triple) -> float:
        blocks = math.prod(tile_counts(shape, tile))
        room = blocks * rows / math.prod(shape)
        return room + 0.1 * abs(math.log(tile[1] / tile[2])) + 0.05 * math.log(frames / tile[0])

    times = [t for t in range(1, frames + 1) if frames % t == 0]
    sizes = itertools.product(times, range(1, min(height, 16) + 1), range(1, min(width, 16) + 1))
    return min((tile for tile in sizes if math.prod(tile) <= rows), key=cost)
