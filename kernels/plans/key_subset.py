"""Parts of a plan: the query blocks of some rows, and keys that stand elsewhere in memory than in their layout's order.

For a KV cache. A plan is made for all frames of a window in the order of time, with the queries of all of them. Of these the
newest frames' are taken, and keys are read where the cache has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Layout


def block_maps(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(full, partial) of a plan, (P, G, Nq, Nk) bool each, as ``plan_from_block_map`` takes them."""
    listed = torch.arange(plan.index.shape[-1], device=plan.device)
    in_full, in_all = listed < plan.ends[..., 1:2], listed < plan.ends[..., 2:3]
    shape = (*plan.index.shape[:3], len(plan.k_start))
    maps = []
    for wanted in (in_full, in_all & ~in_full):
        # Entries past a list's end hold numbers of other blocks: those are sent to a column that is cut off.
        at = torch.where(wanted, plan.index.long(), shape[3])
        whole = torch.zeros(*shape[:3], shape[3] + 1, dtype=torch.bool, device=plan.device)
        maps.append(whole.scatter_(-1, at, True)[..., :-1])
    return maps[0], maps[1]


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


def relocate_keys(plan: BlockPlan, k_start: torch.Tensor) -> BlockPlan:
    """The same plan for keys of which block j begins at row ``k_start[j]``: (Nk,) int; together they fill the same rows."""
    k_start = k_start.to(plan.k_start)
    old, rows = plan.k_start.long(), plan.k_rows.long()
    of_row = torch.repeat_interleave(torch.arange(len(rows), device=plan.device), rows, output_size=plan.k_len)
    target = torch.arange(plan.k_len, device=plan.device) - old[of_row] + k_start.long()[of_row]
    moved: dict[str, Any] = {
        name: torch.empty_like(value).index_copy_(-1, target, value)
        for name, value in (("coords", plan.coords), ("key_encoding", plan.key_encoding))
        if value is not None
    }
    return replace(plan, k_start=k_start, key_start=k_start[plan.index.long()], _cache={}, **moved)
