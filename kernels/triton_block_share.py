"""Triton kernel of ``block_share``: a program holds one block of queries, and goes over the key blocks twice.

    first    m[s] = max_j x[s, j],   l[s] = Σ_j exp(x[s, j] − m[s])              online
    then     share[j] = Σ_s exp(x[s, j] − m[s]) / (l[s] · n)                      a column of the map at a time

Scoring again is cheaper than keeping the scores: they are 128 times the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(
    q, q2, mean_ptr, variance_ptr, rows_ptr, base, j, N, stride_n, column,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[s, j] · log2(e), (BLOCK, BLOCK_N) float32; −inf past the last block."""
    there = j < N
    at = base + j[None, :].to(tl.int64) * stride_n + column[:, None]
    mask = there[None, :] & (column < D)[:, None]
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    log_n = tl.log(tl.load(rows_ptr + j, mask=there, other=1).to(tl.float32))[None, :]
    x = tl.dot(q, mean, input_precision=PRECISION) + log_n
    if variance_ptr is not None:
        variance = tl.load(variance_ptr + at, mask=mask, other=0.0)
        s2 = tl.dot(q2, variance, input_precision=PRECISION)
        s2 = tl.where(s2 < 0, 0.0, s2)  # and nan stays nan
        x += tl.where(s2 <= 2 * log_n, 0.5 * s2, tl.sqrt(2 * s2 * log_n) - log_n)
    return tl.where(there[None, :], x * LOG2E, float("-inf"))


@triton.jit
def block_share_kernel(
    q_ptr, mean_ptr, variance_ptr, start_ptr, rows_ptr, share_ptr, stride_b, stride_s, stride_h, H, Hk, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (N, B·H). variance_ptr: None without."""
    block = tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    first = tl.load(start_ptr + block).to(tl.int64)
    n = tl.load(rows_ptr + block).to(tl.int32)
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = q_ptr + batch * stride_b + head * stride_h + (first + row[:, None]) * stride_s + column[None, :]
    q = tl.load(at, mask=(row < n)[:, None] & (column < D)[None, :], other=0.0)
    scaled = q.to(tl.float32) * scale
    q, q2 = scaled.to(q.dtype), (scaled * scaled).to(q.dtype)
    base = (batch * N * Hk + head // (H // Hk)) * D
    stride_n = Hk * D
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, N, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        x = scores(q, q2, mean_ptr, variance_ptr, rows_ptr, base, j, N, stride_n, column, D, PRECISION)
        new = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
        most = new
    weight = tl.where(row < n, 1.0 / (total * n), 0.0)
    out = share_ptr + (tl.program_id(1).to(tl.int64) * N + block) * N
    for begin in range(0, N, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        x = scores(q, q2, mean_ptr, variance_ptr, rows_ptr, base, j, N, stride_n, column, D, PRECISION)
        tl.store(out + j, tl.sum(tl.exp2(x - most[:, None]) * weight[:, None], 0), mask=j < N)


def launch_config(head_dim: int, itemsize: int, hopper: bool) -> dict[str, int]:
    """Key blocks at a time, warps and pipeline stages: what fits into registers, where products hold their queries before
    Hopper, and into the 99 KiB of shared memory that GPUs for consumers have. Compiled, not yet timed."""
    wide = head_dim * itemsize > 256
    if hopper:
        return {"BLOCK_N": 32 if wide else 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 16 if head_dim * itemsize > 128 else 32, "num_warps": 8, "num_stages": 2}


def triton_block_share(
    query: torch.Tensor,
    key_mean: torch.Tensor,
    key_variance: torch.Tensor | None,
    start: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """(B, H, N, N) float32; arguments as in ``block_share``. Means and variances are rounded to query's dtype."""
    B, _, H, D = query.shape
    N = len(start)
    hopper = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
    key_mean = key_mean.to(query.dtype)
    key_variance = None if key_variance is None else key_variance.to(query.dtype)
    share = torch.empty((B, H, N, N), dtype=torch.float32, device=query.device)
    if share.numel():
        with torch.cuda.device_of(query):
            block_share_kernel[(N, B * H)](
                query, key_mean, key_variance, start, rows, share,
                query.stride(0), query.stride(1), query.stride(2), H, key_mean.shape[2], N, scale,
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK=128,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32", **launch_config(D, query.element_size(), hopper),
            )  # fmt: skip
    return share
