"""Plans that are made anew at every call, from a block map on the device: no value of it is waited for.

    kept[p, g, i, j]   →   index[p, g, i] = the j that are kept, complete blocks first, then ragged ones; ends = their numbers

``plan_from_block_map`` sorts, and asks the device how long the longest list is and what the density comes to; here lists have
room for every block, are filled by a running count, and the density stays on the device as ``BlockPlan.device_density``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from tilewise.kernels.device import runs_triton
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout


@lru_cache(maxsize=64)
def block_table(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(start (N,) int32, rows (N,) int32, is_text (N,) bool) of a layout's blocks on a device; not to be written to."""
    with torch.inference_mode(False):
        start, rows = layout.block_start.to(device, torch.int32), layout.block_rows.to(device, torch.int32)
        return start, rows, layout.is_text.to(device)


@lru_cache(maxsize=64)
def _block_room(layout: Layout) -> int:
    return max(16, 1 << (int(layout.block_rows.max()) - 1).bit_length())


def dynamic_plan(layout: Layout, kept: torch.Tensor) -> BlockPlan:
    """The plan of a block map.

    Args:
        layout: gives the block table; queries and keys share it.
        kept: (P, G, N, N) bool on the device of the tensors to come, True where query block i sees key block j; P 1 or the
            batch size, G 1 or the number of heads. Text blocks are full rows and columns, whatever it says.

    Returns:
        A plan whose ``density`` and ``work`` are nan; ``device_density``, () float32 on the device, is the fraction of token
        pairs that it keeps.

    Raises:
        ValueError: for a map of another shape or dtype.
    """
    N = layout.blocks
    if kept.ndim != 4 or kept.shape[2:] != (N, N) or kept.dtype != torch.bool:
        raise ValueError(
            f"dynamic_plan: kept must be (P, G, {N}, {N}) bool for this layout, got {tuple(kept.shape)} {kept.dtype}"
        )
    start, rows, is_text = block_table(layout, kept.device)
    block = _block_room(layout)
    if runs_triton(kept.device):
        from tilewise.kernels.plans.triton_dynamic_plan import triton_lists

        index, key_start, ends, tokens = triton_lists(kept.contiguous(), start, rows, is_text, block)
    else:
        index, key_start, ends, tokens = lists_reference(kept, start, rows, is_text, block)
    return BlockPlan(
        q_start=start,
        q_rows=rows,
        k_start=start,
        k_rows=rows,
        index=index,
        key_start=key_start,
        ends=ends,
        block=block,
        q_len=layout.grid.tokens,
        k_len=layout.grid.tokens,
        density=math.nan,
        work=math.nan,
        device_density=((tokens * rows).sum(-1).mean() / layout.grid.tokens**2).float(),
    )


def lists_reference(
    kept: torch.Tensor, start: torch.Tensor, rows: torch.Tensor, is_text: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """index, key_start (P, G, N, N) int32, ends (P, G, N, 3) int32 and tokens (P, G, N) float32: keys that each row keeps.

    What follows a list in ``index`` repeats block 0.
    """
    kept = kept | is_text[:, None] | is_text[None, :]
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
