"""Triton kernel of ``dynamic_plan``: a program turns one row of a block map into one list.

position(j) = number of kept complete blocks before j, or, for a ragged j, all of those plus the ragged ones before it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def lists_kernel(
    kept_ptr, start_ptr, rows_ptr, text_ptr, query_text_ptr, index_ptr, key_start_ptr, ends_ptr, tokens_ptr, N, BLOCK,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, P·G). N: number of key blocks."""
    i = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i
    whole_row = tl.load(query_text_ptr + i) != 0
    # Ragged blocks come after all complete ones: count those first.
    complete_count = tl.full((), 0, tl.int32)
    tokens = tl.full((), 0, tl.int32)
    for first in range(0, N, CHUNK):
        j = first + tl.arange(0, CHUNK)
        there = j < N
        rows = tl.load(rows_ptr + j, mask=there, other=0)
        kept = tl.load(kept_ptr + row * N + j, mask=there, other=0) != 0
        kept = (kept | (tl.load(text_ptr + j, mask=there, other=0) != 0) | whole_row) & there
        complete_count += tl.sum((kept & (rows == BLOCK)).to(tl.int32), 0)
        tokens += tl.sum(tl.where(kept, rows, 0), 0)
    complete_seen = tl.full((), 0, tl.int32)
    ragged_seen = complete_count
    for first in range(0, N, CHUNK):
        j = first + tl.arange(0, CHUNK)
        there = j < N
        rows = tl.load(rows_ptr + j, mask=there, other=0)
        start = tl.load(start_ptr + j, mask=there, other=0)
        kept = tl.load(kept_ptr + row * N + j, mask=there, other=0) != 0
        kept = (kept | (tl.load(text_ptr + j, mask=there, other=0) != 0) | whole_row) & there
        complete = (kept & (rows == BLOCK)).to(tl.int32)
        ragged = (kept & (rows != BLOCK)).to(tl.int32)
        position = tl.where(
            complete != 0, complete_seen + tl.cumsum(complete, 0) - 1, ragged_seen + tl.cumsum(ragged, 0) - 1
        )
        tl.store(index_ptr + row * N + position, j, mask=kept)
        tl.store(key_start_ptr + row * N + position, start, mask=kept)
        complete_seen += tl.sum(complete, 0)
        ragged_seen += tl.sum(ragged, 0)
    # Kernels fetch one entry ahead of a list's end: what stands there must be a block.
    for first in range(0, N, CHUNK):
        j = first + tl.arange(0, CHUNK)
        unused = (j >= ragged_seen) & (j < N)
        tl.store(index_ptr + row * N + j, 0, mask=unused)
        tl.store(key_start_ptr + row * N + j, 0, mask=unused)
    tl.store(ends_ptr + row * 3, complete_count)
    tl.store(ends_ptr + row * 3 + 1, ragged_seen)
    tl.store(ends_ptr + row * 3 + 2, ragged_seen)
    tl.store(tokens_ptr + row, tokens.to(tl.float32))


def triton_lists(
    kept: torch.Tensor,
    start: torch.Tensor,
    rows: torch.Tensor,
    is_text: torch.Tensor,
    query_is_text: torch.Tensor,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``lists_reference``; kept must be contiguous."""
    P, G, Nq, Nk = kept.shape
    index = torch.empty((P, G, Nq, Nk), dtype=torch.int32, device=kept.device)
    key_start = torch.empty_like(index)
    ends = torch.empty((P, G, Nq, 3), dtype=torch.int32, device=kept.device)
    tokens = torch.empty((P, G, Nq), dtype=torch.float32, device=kept.device)
    chunk = min(1024, max(16, triton.next_power_of_2(Nk)))
    if kept.numel():
        with torch.cuda.device_of(kept):
            lists_kernel[(Nq, P * G)](
                kept.view(torch.uint8), start, rows, is_text.view(torch.uint8), query_is_text.view(torch.uint8),
                index, key_start, ends, tokens, Nk, block,
                CHUNK=chunk, num_warps=4,
            )  # fmt: skip
    return index, key_start, ends, tokens
