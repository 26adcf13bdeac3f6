"""Sparse attention of a chunk to the window of a KV cache: which blocks of the window each block of the chunk sees.

The method plans for a grid of all frames of the window in the order of time. The chunk's rows of that plan are kept, memory and
sink are seen whole, and keys are read where the ring has them: one plan for each turn of the ring, made once. Chunks are stored
in tile order, each by itself, so that the blocks of a chunk stay together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.key_subset import newest_queries, relocate_keys
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout, cached_layout, tile_counts
from tilewise.plugins.methods.base import DynamicMethod, Method
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
        self.memory = memory
        self.sink = cache.sink
        self.layout: Layout | None = None
        self._plans: dict[tuple, BlockPlan] = {}
        self.reason = self._refusal(grid, cache)
        if not self.reason:
            self.layout = cached_layout(grid, self.tile)

    def _refusal(self, grid: Grid, cache: KVCache) -> str:
        for what, frames in (("window", cache.window), ("sink", cache.sink), ("memory", self.memory)):
            if frames % grid.t:
                return f"a {what} of {frames} latent frames is no multiple of a chunk of {grid.t}"
        if isinstance(self.method, DynamicMethod):
            return f"the method {self.method.name} does not plan for more keys than queries yet"
        if getattr(self.method, "dilation", (1, 1, 1)) != (1, 1, 1):
            return f"dilated windows of {self.method.name} have a token order of their own"
        tile = getattr(self.method, "tile", None)
        self.tile: Triple = tile or choose_chunk_tile(grid.shape)
        if grid.t % self.tile[0]:
            return (
                f"tiles of {self.tile[0]} latent frames do not divide a chunk of {grid.t}; give tile=({grid.t}, h, w)"
            )
        return ""

    def scale(self, frames: int, head_dim: int) -> float | None:
        """The attention scale of the method over so many frames, or None: the call's own."""
        assert self.layout is not None
        grid = self.layout.grid
        return self.method.scale(cached_layout(Grid(frames, grid.h, grid.w), self.layout.tile), head_dim)

    def plan(self, slots: Sequence[int], has_memory: bool, heads: int, device: torch.device) -> BlockPlan:
        """The plan of a chunk over a window whose frames stand in ``slots``, in the order of time; the chunk's own come last."""
        memory = self.memory if has_memory else 0
        key = (tuple(slots), memory, heads, device)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._make(slots, memory, heads, device)
        return found

    def _make(self, slots: Sequence[int], memory: int, heads: int, device: torch.device) -> BlockPlan:
        assert self.layout is not None
        chunk, layout = self.chunk, self.layout
        frames = memory + len(slots)
        whole = cached_layout(Grid(frames, layout.grid.h, layout.grid.w), layout.tile)
        method: Any = self.method
        if hasattr(method, "tile"):
            method = dataclasses.replace(method, tile=layout.tile)
        plan = method.plan(whole, heads, device)
        chunks = frames // chunk
        always = torch.arange(whole.blocks) < (memory + self.sink) // chunk * layout.blocks
        plan = newest_queries(plan, whole, layout, always)
        # Where each chunk of the window begins in the buffer's view: memory first, then slots.
        begins = [*range(0, memory, chunk), *(memory + slot for slot in slots[::chunk])]
        at = torch.tensor(begins)[:, None] * (layout.grid.h * layout.grid.w) + layout.block_start
        assert at.shape == (chunks, layout.blocks)
        return relocate_keys(plan, at.flatten().to(device))


def choose_chunk_tile(shape: Triple) -> Triple:
    """A tile of a chunk (t, h, w): whole in time if that leaves room, near 128 tokens, such that blocks are well filled."""
    frames, height, width = shape

    def cost(tile: Triple) -> float:
        blocks = math.prod(tile_counts(shape, tile))
        room = blocks * MAX_BLOCK_ROWS / math.prod(shape)
        return room + 0.1 * abs(math.log(tile[1] / tile[2])) + 0.05 * math.log(frames / tile[0])

    times = [t for t in range(1, frames + 1) if frames % t == 0]
    sizes = itertools.product(times, range(1, min(height, 16) + 1), range(1, min(width, 16) + 1))
    return min((tile for tile in sizes if math.prod(tile) <= MAX_BLOCK_ROWS), key=cost)
