"""Triton kernel of ``block_stats``: a program has one block of one head, and reads BLOCK of its rows at a time.

mean = Σ x / n,   var = Σ (x − mean)² / n        the variance reads x again, from the cache
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def block_stats_kernel(
    x_ptr, start_ptr, rows_ptr, mean_ptr, variance_ptr, stride_b, stride_s, stride_h, H, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (N, B·H). variance_ptr: None if not wanted."""
    block = tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    first = tl.load(start_ptr + block).to(tl.int64)
    n = tl.load(rows_ptr + block).to(tl.int32)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)
    at = x_ptr + batch * stride_b + head.to(tl.int64) * stride_h + (first + row) * stride_s + column[None, :]
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for r in range(0, n, BLOCK):
        mask = (r + row < n) & (column < D)[None, :]
        mean += tl.sum(tl.load(at + r * stride_s, mask=mask, other=0.0).to(tl.float32), 0)
    mean = mean / n
    out = ((batch * N + block) * H + head) * D + column
    tl.store(mean_ptr + out, mean, mask=column < D)
    if variance_ptr is not None:
        variance = tl.zeros((BLOCK_D,), tl.float32)
        for r in range(0, n, BLOCK):
            mask = (r + row < n) & (column < D)[None, :]
            x = tl.load(at + r * stride_s, mask=mask, other=0.0).to(tl.float32)
            away = tl.where(mask, x - mean[None, :], 0.0)
            variance += tl.sum(away * away, 0)
        tl.store(variance_ptr + out, variance / n, mask=column < D)


def triton_block_stats(
    x: torch.Tensor,
    start: torch.Tensor,
    rows: torch.Tensor,
    variance: bool,
    usual: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean, (B, N, H, D) in ``dtype``, and variance, float32; arguments as in ``block_stats``."""
    B, _, H, D = x.shape
    N = len(start)
    mean = x.new_empty((B, N, H, D), dtype=dtype)
    spread = torch.empty_like(mean, dtype=torch.float32) if variance else None
    at_once = min(128, max(16, triton.next_power_of_2(usual)))  # more than there are costs registers and masked loads
    if mean.numel():
        with torch.cuda.device_of(x):
            block_stats_kernel[(N, B * H)](
                x, start, rows, mean, spread, x.stride(0), x.stride(1), x.stride(2), H, N,
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK=at_once,
                num_warps=4 if at_once > 32 else 1,
            )  # fmt: skip
    return mean, spread


def by_head(x: torch.Tensor, dtype: torch.dtype, multiple: int) -> torch.Tensor:
    """(B, N, H, D) → (B, H, N rounded up, D) in ``dtype``, zeros behind: loads that need no mask keep the pipeline full."""
    B, N, H, D = x.shape
    out = x.new_zeros((B, H, triton.cdiv(N, multiple) * multiple, D), dtype=dtype)
    out[:, :, :N] = x.transpose(1, 2)
    return out
