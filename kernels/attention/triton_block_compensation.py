"""Triton kernel of ``add_block_compensation``: attention of a query block over all summary rows, merged with what it saw.

    z = scale · q·key_mean + bias,   out' = (out + Σ exp(z − lse)·value_mean) / (1 + Σ exp(z − lse))

What was seen is the first entry of the softmax, with the weight 1. As what was kept outweighs a summary row as a rule, lse serves
as the reference of all exponents: no running maximum, and no accumulator to scale down. Where a row is heavier than what was
seen by 2¹⁴ or more, or nothing was seen, the block is done again with a running maximum: by a second launch, whose blocks
otherwise return at once (both in one kernel take the registers of both).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.chips import has_large_memory
from tilewise.kernels.plans.mean_lists import with_rows_in_line
from tilewise.kernels.selection.triton_block_stats import by_head

LOG2E = 1.4426950408889634
MOST = tl.constexpr(2.0**14)  # of all weights: what float16 holds, twice over


@triton.jit
def add_block_compensation_kernel(
    q_ptr, seen_ptr, lse_ptr, key_ptr, value_ptr, bias_ptr, start_ptr, rows_ptr, out_ptr, heavy_ptr,
    stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, stride_bb, stride_bh,
    S, H, N, padded, group, scale_log2, log2e,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONLINE: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, B·H). N: key blocks. key and value: (B, Hk, padded, D) in q's dtype, padded ≥ N a multiple of BLOCK_N.
    group: query heads a key head. heavy: (B, H, query blocks) int8, what has to be done again: written, or with ONLINE read."""
    i = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i  # of all heads and samples
    if ONLINE:  # noqa: SIM102 - for the compiler, the other when it runs
        if tl.load(heavy_ptr + block) == 0:
            return
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = tl.load(start_ptr + i).to(tl.int64)
    n = tl.load(rows_ptr + i)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    there, width = row < n, column < D
    mask = there[:, None] & width[None, :]
    at = batch * stride_qb + head.to(tl.int64) * stride_qh + (first + row)[:, None] * stride_qs + column[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    seen_at = batch * stride_ob + head.to(tl.int64) * stride_oh + (first + row)[:, None] * stride_os + column[None, :]
    acc = tl.load(seen_ptr + seen_at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(lse_ptr + (batch * H + head) * S + first + row, mask=there, other=0.0) * log2e
    m = tl.maximum(m, -1e30)  # a query that saw nothing: its weight of 1 falls away as soon as there is a summary row
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    means_at = (batch * (H // group) + head // group) * padded * D + column[None, :]
    bias_at = bias_ptr + batch * stride_bb + head.to(tl.int64) * stride_bh + i.to(tl.int64) * N
    for j0 in range(0, N, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_at + j, mask=j < N, other=float("-inf")) * log2e
        means = means_at + j[:, None] * D
        keys = tl.load(key_ptr + means, mask=width[None, :], other=0.0)
        x = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2 + bias[None, :]
        if ONLINE:
            new = tl.maximum(m, tl.max(x, 1))
            shrink = tl.exp2(m - new)
            total *= shrink
            acc *= shrink[:, None]
            m = new
        p = tl.exp2(x - m[:, None])
        total += tl.sum(p, 1)
        values = tl.load(value_ptr + means, mask=width[None, :], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
    if not ONLINE:
        tl.store(heavy_ptr + block, (tl.max(tl.where(there, total, 0.0), 0) >= MOST).to(tl.int8))
    acc = acc / total[:, None]
    out_at = ((batch * S + first + row)[:, None] * H + head) * D + column[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def triton_add_block_compensation(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    bias: torch.Tensor,
    start: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As ``add_block_compensation``. The means are rounded to q's dtype, as keys and values are."""
    B, S, H, D = q.shape
    N, Hk = key_mean.shape[1:3]
    config = launch_config(D, q.element_size(), has_large_memory(q.device))
    keys, values = (by_head(x, q.dtype, config["BLOCK_N"]) for x in (key_mean, value_mean))
    merged = torch.empty((B, S, H, D), dtype=out.dtype, device=out.device)
    if out.stride(3) != 1:
        out = out.contiguous()
    bias = with_rows_in_line(bias)
    heavy = torch.empty((B, H, len(start)), dtype=torch.int8, device=out.device)
    if merged.numel():
        with torch.cuda.device_of(q):
            for online in (False, True):
                add_block_compensation_kernel[(len(start), B * H)](
                    q, out, lse.contiguous(), keys, values, bias, start, rows, merged, heavy,
                    q.stride(0), q.stride(1), q.stride(2), out.stride(0), out.stride(1), out.stride(2),
                    bias.stride(0), bias.stride(1), S, H, N, keys.shape[2], H // Hk, scale * LOG2E, LOG2E,
                    D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_M=128, ONLINE=online, **config,
                )  # fmt: skip
    return merged


def launch_config(head_dim: int, itemsize: int, hopper: bool) -> dict[str, int]:
    """Summary rows at a time, warps and pipeline stages. On an H100 at 115,200 tokens and 24 heads × 128: 3.4 ms; 64 rows at a
    time or 8 warps 4.7, the running maximum in every block 4.0. Before Hopper, whose products read the queries from shared
    memory, heads wider than 64 need the registers of 8 warps; and so do wide rows everywhere."""
    wide = head_dim * itemsize > (256 if hopper else 128)
    if wide and not hopper and head_dim * itemsize > 256:  # 99 KiB, of which the queries take 64
        return {"BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    if wide:
        return {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
