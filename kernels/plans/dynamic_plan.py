"""Plans that are made anew at every call, from a block map on the device: no value of it is waited for.

    kept[p, g, i, j]   →   index[p, g, i] = the j that are kept, complete blocks first, then ragged ones; ends = their numbers

``plan_from_block_map`` sorts, and asks the device how long the longest list is and what the density comes to; here lists have
room for every block, are filled by a running count, and the density stays on the device as ``BlockPlan.device_density``.
"""

from __future__ import annotations

import math

import torch

from tilewise.kernels.device import runs_triton
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout


def dynamic_plan(layout: Layout, kept: torch.Tensor, *, key_layout: Layout | None = None) -> BlockPlan:
    """The plan of a block map.

    Args:
        layout: block table of the queries, and of the keys too unless ``key_layout`` is given.
        kept: (P, G, Nq, Nk) bool on the device of the tensors to come, True where query block i sees key block j; P 1 or the
            batch size, G 1 or the number of heads. Text blocks are full rows and columns, whatever it says.
        key_layout: block table of the keys, for queries of another sequence.

    Returns:
        A plan whose ``density`` and ``work`` are nan; ``device_density``, () float32 on the device, is the fraction of token
        pairs that it keeps, and ``head_density``, (P, G) float32, that of each list.

    Raises:
        ValueError: for a map of another shape or dtype.
    """
    keys = layout if key_layout is None else key_layout
    if kept.ndim != 4 or kept.shape[2:] != (layout.blocks, keys.blocks) or kept.dtype != torch.bool:
        raise ValueError(
            f"dynamic_plan: kept must be (P, G, {layout.blocks}, {keys.blocks}) bool for this layout, got "
            f"{tuple(kept.shape)} {kept.dtype}"
        )
    q_start, q_rows, q_text = layout.block_table(kept.device)
    k_start, k_rows, k_text = keys.block_table(kept.device)
    block = max(layout.room, keys.room)
    if runs_triton(kept.device):
        from tilewise.kernels.plans.triton_dynamic_plan import triton_lists

        index, key_start, ends, tokens = triton_lists(kept.contiguous(), k_start, k_rows, k_text, q_text, block)
    else:
        index, key_start, ends, tokens = lists_reference(kept, k_start, k_rows, k_text, q_text, block)
    q_len, k_len = layout.grid.tokens, keys.grid.tokens
    head_density = ((tokens * q_rows).sum(-1) / (q_len * k_len)).float()
    return BlockPlan(
        q_start=q_start,
        q_rows=q_rows,
        k_start=k_start,
        k_rows=k_rows,
        index=index,
        key_start=key_start,
        ends=ends,
        block=block,
        q_len=q_len,
        k_len=k_len,
        density=math.nan,
        work=math.nan,
        device_density=head_density.mean(),
        head_density=head_density,
    )


def lists_reference(
    kept: torch.Tensor,
    start: torch.Tensor,
    rows: torch.Tensor,
    is_text: torch.Tensor,
    query_is_text: torch.Tensor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lists of a map, block by block.

    Args:
        kept: (P, G, Nq, Nk) bool.
        start, rows, is_text: (Nk,) of the key blocks. query_is_text: (Nq,). block: rows of a complete block.

    Returns:
        index, key_start (P, G, Nq, Nk) int32; ends (P, G, Nq, 3) int32; tokens (P, G, Nq) float32, keys that each row keeps.
        What follows a list in ``index`` repeats block 0.
    """
    kept = kept | query_is_text[:, None] | is_text[None, :]
    complete, ragged = kept & (rows == block), kept & (rows != block)
    counts = complete.sum(-1, dtype=torch.int32)
    ends = torch.stack([counts, counts + ragged.sum(-1, dtype=torch.int32)], -1)[..., [0, 1, 1]]
    position = torch.where(complete, complete.cumsum(-1), counts[..., None] + ragged.cumsum(-1)) - 1
    # One place more than there are blocks takes those that are not kept.
    N = kept.shape[-1]
    numbers = torch.arange(N, dtype=torch.int32, device=kept.device).expand_as(kept)
    index = torch.zeros(*kept.shape[:-1], N + 1, dtype=torch.int32, device=kept.device)
    index.scatter_(-1, torch.where(kept, position, N), numbers)
    index = index[..., :N].contiguous()
    tokens = (kept * rows).sum(-1, dtype=torch.float32)
    return index, start[index.long()], ends, tokens
