"""Triton kernel of ``add_skipped``: attention of one query block over all summary rows, merged with what it saw at the end.

    z = scale · q·key_mean + bias,   out' = (exp(lse − m)·out + Σ exp(z − m)·value_mean),   m = logaddexp(lse, logsumexp z)

The running maximum starts at lse with the weight 1: what was seen is the first entry of the softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.triton_block_stats import by_head

LOG2E = 1.4426950408889634


@triton.jit
def add_skipped_kernel(
    q_ptr, seen_ptr, lse_ptr, key_ptr, value_ptr, bias_ptr, start_ptr, rows_ptr, out_ptr,
    stride_qb, stride_qs, stride_qh, stride_ob, stride_os, stride_oh, S, H, N, padded, group, scale_log2, log2e,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (N, B·H). key and value: (B, Hk, padded, D) in q's dtype, padded ≥ N a multiple of BLOCK_N. group: query heads a key
    head."""
    i = tl.program_id(0)
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
    bias_at = bias_ptr + ((batch * H + head) * N + i) * N
    for j0 in range(0, N, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        inside = j < N
        bias = tl.load(bias_at + j, mask=inside, other=float("-inf")) * log2e
        means = means_at + j[:, None] * D
        keys = tl.load(key_ptr + means, mask=width[None, :], other=0.0)
        z = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2 + bias[None, :]
        new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp2(z - new[:, None])
        shrink = tl.exp2(m - new)
        total = total * shrink + tl.sum(p, 1)
        values = tl.load(value_ptr + means, mask=width[None, :], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        m = new
    acc = acc / total[:, None]
    out_at = ((batch * S + first + row)[:, None] * H + head) * D + column[None, :]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def triton_add_skipped(
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
    """As ``add_skipped``. The means are rounded to q's dtype, as keys and values are."""
    B, S, H, D = q.shape
    N, Hk = key_mean.shape[1:3]
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    config = launch_config(D, q.element_size(), hopper)
    keys, values = (by_head(x, q.dtype, config["BLOCK_N"]) for x in (key_mean, value_mean))
    merged = torch.empty((B, S, H, D), dtype=out.dtype, device=out.device)
    if out.stride(3) != 1:
        out = out.contiguous()
    if merged.numel():
        with torch.cuda.device_of(q):
            add_skipped_kernel[(N, B * H)](
                q, out, lse.contiguous(), keys, values, bias.contiguous(), start, rows, merged,
                q.stride(0), q.stride(1), q.stride(2), out.stride(0), out.stride(1), out.stride(2),
                S, H, N, keys.shape[2], H // Hk, scale * LOG2E, LOG2E,
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_M=128,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **config,
            )  # fmt: skip
    return merged


def launch_config(head_dim: int, itemsize: int, hopper: bool) -> dict[str, int]:
    """Warps and pipeline stages. 32 summary rows at a time and few warps win: 4.0 ms at 115,200 tokens and 24 heads × 128 on an
    H200, where 64 rows and 8 warps take 5.1. Before Hopper, whose products read the queries from shared memory, heads wider
    than 64 need the registers of 8 warps; and so do wide rows everywhere."""
    wide = head_dim * itemsize > (256 if hopper else 128)
    return {"BLOCK_N": 32, "num_warps": 8 if wide else 4, "num_stages": 2 if wide else 3}
