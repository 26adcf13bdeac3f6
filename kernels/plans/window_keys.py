"""The queries of the newest frames over the keys of a window of frames, whose chunks lie in memory in another order than in time.

For a KV cache. A plan is made for all frames of a window in the order of time, with the queries of all of them. Of these the
newest chunk's are taken, and keys are read where the cache has them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, block_maps, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout

T = TypeVar("T")


@dataclass(frozen=True)
class WindowKeys:
    """The keys of a window of frames, for the queries of its newest chunk. Each chunk is in tile order by itself.

        in time      | 0 | 1 | 2 | 3 | 4 |       chunks; the last one's tokens are the queries
        in memory    | 0 | 3 | 1 | 2 | 4 |       order = (0, 3, 1, 2, 4)

    All chunks have the same blocks, so that one table of blocks serves both orders.

    Args:
        chunk: layout of the queries. Its tile divides its frames; it has no text.
        order: the number, in the order of time, of the chunk at each place of the memory. The newest comes last.
        kept: how many chunks every query sees whatever a method says; in both orders they come first.

    Raises:
        ValueError: for a tile or an order that is not so.
    """

    chunk: Layout
    order: tuple[int, ...]
    kept: int = 0
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        chunks, grid = len(self.order), self.chunk.grid
        if grid.t % self.chunk.tile[0] or grid.text:
            raise ValueError(
                f"WindowKeys: tiles of {self.chunk.tile[0]} latent frames must divide a chunk without text, got {grid}"
            )
        first = tuple(range(self.kept))
        if (
            sorted(self.order) != list(range(chunks))
            or self.order[: self.kept] != first
            or self.order[-1] != chunks - 1
        ):
            raise ValueError(
                f"WindowKeys: order must have each of {chunks} chunks once, the {self.kept} that are kept first and the newest "
                f"last, got {self.order}"
            )

    @cached_property
    def layout(self) -> Layout:
        """Of the whole window in the order of time; its table of blocks is that of the memory as well."""
        grid = self.chunk.grid
        return cached_layout(Grid(len(self.order) * grid.t, grid.h, grid.w), self.chunk.tile)

    @cached_property
    def in_time(self) -> torch.Tensor:
        """(Nk,) int64: the number in ``layout`` of the block at each place of the memory."""
        blocks = torch.arange(self.chunk.blocks, device="cpu")
        return (torch.tensor(self.order, device="cpu")[:, None] * self.chunk.blocks + blocks).flatten()

    @cached_property
    def always(self) -> torch.Tensor:
        """(Nk,) bool: blocks of the chunks that every query sees."""
        return torch.arange(self.layout.blocks, device="cpu") < self.kept * self.chunk.blocks

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key: plans and tables on a device. They are freed with this."""
        if key not in self._derived:
            self._derived[key] = make()
        found: T = self._derived[key]
        return found

    def plan(self, whole: BlockPlan) -> BlockPlan:
        """A plan over ``layout``, for the queries of the newest chunk and the keys in memory; ``kept`` chunks are seen whole."""
        newest = newest_queries(whole, self.layout, self.chunk, self.always)
        return reorder_key_blocks(newest, self.in_time)


def newest_queries(plan: BlockPlan, whole: Layout, newest: Layout, always: torch.Tensor) -> BlockPlan:
    """The plan of the last query blocks of another plan.

    Args:
        plan: over ``whole``, queries and keys alike.
        newest: layout of the frames at its end, whose blocks are the last ones of ``whole``, with the same tile.
        always: (Nk,) bool, key blocks that every query sees besides.
    """
    full, partial = (of_all[:, :, -newest.blocks :] for of_all in block_maps(plan))
    full = full | always.to(full.device)
    if plan.intervals is None or not bool((partial & ~full).any()):
        return plan_from_block_map(newest, full, key_layout=whole, head_set=plan.head_set)
    rows = plan.intervals[:, :, -newest.grid.tokens :]
    return plan_from_block_map(newest, full, partial, key_layout=whole, intervals=rows, head_set=plan.head_set)


def reorder_key_blocks(plan: BlockPlan, order: torch.Tensor) -> BlockPlan:
    """The same plan for keys whose blocks lie in another order: the block that was ``order[j]``, (Nk,) int64, is block j."""
    order = order.to(plan.device)
    rows = plan.k_rows[order]
    start = (rows.cumsum(0) - rows).to(plan.k_start)
    blocks = torch.arange(len(rows), device=plan.device)
    number = torch.empty_like(order).scatter_(0, order, blocks).to(plan.index)
    of_row = torch.repeat_interleave(blocks, rows.long(), output_size=plan.k_len)
    row = torch.arange(plan.k_len, device=plan.device) - start[of_row] + plan.k_start[order][of_row]
    moved: dict[str, Any] = {
        name: value[..., row].contiguous()
        for name, value in (("coords", plan.coords), ("key_encoding", plan.key_encoding))
        if value is not None
    }
    index = number[plan.index.long()]
    return replace(plan, k_start=start, k_rows=rows, index=index, key_start=start[index.long()], _cache={}, **moved)
