"""A coarse far field for windows: what a window leaves out is seen as the means of small cells.

For query block i, a cell of which n tokens lie outside of what the block's queries see is one more key in the same softmax:

    score   scale · q · mean(k) + log n            bias[i, cell] = log n, −inf where n = 0
    value   mean(v)

As far as scores within a cell are alike, that equals the sum over its n tokens. Pairs cost ``density`` (exact) + ``share``
(coarse) of all. Keys that some queries of a block see and others do not are missing for the others: n counts what is outside of
the box around everything that the block's queries see.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, block_maps, block_reduce
from tilewise.kernels.plans.cells import CellLayout, FarField


def with_far_field(plan: BlockPlan, layout: CellLayout) -> BlockPlan:
    """The plan of a window, with the far field of its layout's cells; the plan itself where the window leaves nothing out.

    Args:
        plan: over ``layout``, queries and keys alike, one for all samples (P = 1).
        layout: of queries and keys.

    Raises:
        ValueError: for a plan over other tokens, or of single samples.
    """
    if plan.index.shape[0] != 1 or not plan.q_len == plan.k_len == layout.grid.tokens:
        raise ValueError(
            f"with_far_field: needs one plan for all samples over the {layout.grid.tokens} tokens of the grid {layout.grid}; got "
            f"{plan.index.shape[0]} over {plan.q_len} queries and {plan.k_len} keys"
        )
    device = plan.device
    start, rows = layout.cell_start.to(device), layout.cell_rows.to(device)
    outside = _outside_intervals(plan, layout) if plan.intervals is not None else _outside_blocks(plan, start, rows)
    outside = outside.masked_fill(layout.is_text.to(device)[:, None], 0)  # text sees everything
    coarse = ((outside > 0) * plan.q_rows[:, None]).sum((1, 2)).double()  # (G,)
    sets = torch.bincount(plan.head_set.long(), minlength=plan.sets) if plan.head_set is not None else None
    mean = coarse.mean() if sets is None else (coarse * sets.to(device)).sum() / sets.sum()
    share = float(mean) / (plan.q_len * plan.k_len)
    if not share:
        return plan
    far = FarField(start.int(), rows.int(), outside.float().log(), share, math.prod(layout.cell))
    return replace(plan, far=far, _cache={})


def _outside_blocks(plan: BlockPlan, start: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(G, Nq, Nc) int64: tokens of a cell that lie in key blocks which a query block does not see. A cell may lie in several."""
    full, _ = block_maps(plan)
    _, sets, queries, _ = full.shape
    block = torch.repeat_interleave(plan.k_rows.long(), output_size=plan.k_len)  # of each token
    cells = torch.repeat_interleave(rows, output_size=int(rows.sum()))
    tokens = torch.arange(len(cells), device=plan.device) + start[0]
    hidden = torch.zeros(sets, queries, len(rows), dtype=torch.int64, device=plan.device)
    # Pairs of (cell, block) with their common tokens: few more than there are cells.
    pairs, common = torch.unique(torch.stack([cells, block[tokens]]), dim=1, return_counts=True)
    return hidden.index_add_(2, pairs[0], (~full[0][:, :, pairs[1]]) * common)


def _outside_intervals(plan: BlockPlan, layout: CellLayout) -> torch.Tensor:
    """(G, Nq, Nc) int64: tokens of a cell outside of the box around the intervals of a query block's rows."""
    assert plan.intervals is not None
    device = plan.device
    rows = plan.q_rows.long()
    lo = block_reduce(plan.intervals[:, 0::2].contiguous(), rows, "amin")  # (G, 3, Nq)
    hi = block_reduce(plan.intervals[:, 1::2].contiguous(), rows, "amax")
    first_token = int(layout.cell_start[0])
    video = layout.coords[:, first_token : first_token + layout.grid.video].to(device)
    cell_rows = layout.cell_rows.to(device)
    first = block_reduce(video, cell_rows, "amin")  # (3, Nc)
    end = block_reduce(video, cell_rows, "amax") + 1
    inside = torch.minimum(hi[..., None], end[:, None]) - torch.maximum(lo[..., None], first[:, None])
    return cell_rows - inside.clamp_min(0).prod(1)
