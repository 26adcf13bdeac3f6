"""What one query token sees: the row of a plan's mask that belongs to it, as a region of the video.

    region[t, h, w] = mask[query, token at (t, h, w)]

Of the whole mask (S × S) only that one row is made, from the lists of the query's block and, in partial blocks, from the
query's own intervals: exact, and cheap enough for a picture that follows the mouse.
"""

from __future__ import annotations

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.cells import CellLayout
from tilewise.kernels.plans.layout import Layout


def region_of_query(
    plan: BlockPlan, layout: Layout, position: tuple[int, int, int], head: int, *, sample: int = 0
) -> torch.Tensor:
    """The video tokens that the query at ``position`` sees.

    Args:
        plan: of one attention call; for the tokens of ``layout``, on any device.
        layout: the token order that the plan speaks of.
        position: (t, h, w) of the query, in tokens of the grid (latent frames and patches, not pixels).
        head: attention head, from 0.
        sample: of the batch, where the plan has lists of their own for each sample; else of no effect.

    Returns:
        bool (T, H, W) on the CPU, in raster order: True where the query sees the token. Text tokens, which every query sees, are
        not part of it.

    Raises:
        ValueError: a position outside the grid, a head or sample that the plan does not have, a plan of another length.
    """
    p, g, query, block = _lists_of(plan, layout, position, head, sample)
    grid = layout.grid
    _, full, total = plan.ends[p, g, block].tolist()
    starts, rows = plan.k_start.cpu(), plan.k_rows.cpu()
    seen = torch.zeros(grid.tokens, dtype=torch.bool)
    for number, key_block in enumerate(plan.index[p, g, block, :total].tolist()):
        keys = slice(int(starts[key_block]), int(starts[key_block] + rows[key_block]))
        seen[keys] = True if number < full else plan.visible(g, slice(query, query + 1), keys)[0].cpu()
    return _video(seen, layout)


def cells_of_query(plan: BlockPlan, layout: CellLayout, position: tuple[int, int, int], head: int) -> torch.Tensor:
    """The video tokens that the query at ``position`` sees as means: those of a far field.

    Args: as of ``region_of_query``; the layout with the cells of the plan's far field.

    Returns:
        int64 (T, H, W) on the CPU: 0 where a token is seen exactly or not at all, else the number of its cell, from 1.

    Raises:
        ValueError: as ``region_of_query``.
    """
    _, g, _, block = _lists_of(plan, layout, position, head, 0)
    if plan.far is None:
        return torch.zeros(layout.grid.shape, dtype=torch.int64)
    far = plan.far.to("cpu")
    numbers = torch.arange(1, len(far.rows) + 1).masked_fill(far.bias[g, block].isneginf(), 0)
    cells = torch.zeros(layout.grid.tokens, dtype=torch.int64)
    first = int(far.start[0])
    cells[first : first + layout.grid.video] = torch.repeat_interleave(numbers, far.rows.long())
    return _video(cells, layout).masked_fill(region_of_query(plan, layout, position, head), 0)


def _lists_of(
    plan: BlockPlan, layout: Layout, position: tuple[int, int, int], head: int, sample: int
) -> tuple[int, int, int, int]:
    """Where a query's lists are in a plan, its place in the layout's order, and its block. Raises as `region_of_query`."""
    grid = layout.grid
    if plan.q_len != grid.tokens or plan.k_len != grid.tokens:
        raise ValueError(
            f"region_of_query: the plan is for {plan.q_len} queries and {plan.k_len} keys, the grid {grid} has {grid.tokens} "
            "tokens; give the layout that the plan was made with"
        )
    if len(position) != 3 or not all(0 <= at < length for at, length in zip(position, grid.shape, strict=True)):
        raise ValueError(f"region_of_query: the position {tuple(position)} (t, h, w) is not in the grid {grid}")
    samples, sets = plan.index.shape[:2]
    if samples > 1 and not 0 <= sample < samples:
        raise ValueError(f"region_of_query: there is no sample {sample}; the plan has lists for {samples}")
    heads = len(plan.head_set) if plan.head_set is not None else sets
    if head < 0 or ((plan.head_set is not None or sets > 1) and head >= heads):
        raise ValueError(f"region_of_query: there is no head {head}; the plan has lists for {heads}")

    p = sample if samples > 1 else 0
    g = int(plan.head_set[head]) if plan.head_set is not None else (head if sets > 1 else 0)
    query = query_row(layout, position)
    block = int(torch.searchsorted(plan.q_start.cpu().long(), query, right=True)) - 1
    return p, g, query, block


def _video(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(T, H, W) of values (S,) in the layout's order."""
    grid = layout.grid
    return values[layout.inverse.cpu()][grid.video_start : grid.video_start + grid.video].reshape(grid.shape)


def query_row(layout: Layout, position: tuple[int, int, int]) -> int:
    """The place in the layout's order of the video token at ``position`` (t, h, w)."""
    grid = layout.grid
    t, h, w = position
    raster = (t * grid.h + h) * grid.w + w
    return int(layout.inverse[grid.video_start + raster])
