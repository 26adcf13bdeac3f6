"""Triton kernel of ``block_share``: a program holds the drafted queries of a few blocks, and goes over the key blocks twice.

    first    m[s] = max_j x[s, j],   l[s] = Σ_j exp(x[s, j] − m[s])              online
    then     share[i, j] = Σ_s exp(x[s, j] − m[s]) / (l[s] · n)                  columns of the map at a time, s of block i

Scoring again is cheaper than keeping the scores. All is in units of log 2: x · log₂e is q·k̄ + log₂n + c with q, q² and log n so
scaled, as c is homogeneous in them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.chips import has_large_memory
from tilewise.kernels.selection.triton_block_scores import term
from tilewise.kernels.selection.triton_block_stats import by_head

LOG2E = 1.4426950408889634
ROWS, FEWER_ROWS = 128, 64  # queries of a program; where shared memory has no room for more


@triton.jit
def scores(q, q2, mean_ptr, variance_ptr, log_rows_ptr, base, j, N, column, D: tl.constexpr):
    """x[s, j] · log2(e), (ROWS, BLOCK_N) float32; −inf past the last block. Means lie padded to whole BLOCK_N."""
    at = base + j[None, :] * D + column[:, None]
    narrow = (column < D)[:, None]
    mean = tl.load(mean_ptr + at, mask=narrow, other=0.0)
    log_n = tl.load(log_rows_ptr + j)[None, :]
    x = tl.dot(q, mean, input_precision="ieee") + log_n
    if variance_ptr is not None:
        variance = tl.load(variance_ptr + at, mask=narrow, other=0.0)
        x += term(tl.dot(q2, variance, input_precision="ieee"), log_n)
    return tl.where((j < N)[None, :], x, float("-inf"))


@triton.jit
def block_share_kernel(
    q_ptr, mean_ptr, variance_ptr, log_rows_ptr, start_ptr, rows_ptr, share_ptr,
    stride_b, stride_s, stride_h, H, Hk, M, N, padded, scale, square,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (⌈M / (ROWS / QUERIES)⌉, B·H). M, N: query and key blocks. mean and variance: (B, Hk, padded, D);
    variance_ptr: None without."""
    GROUP: tl.constexpr = ROWS // QUERIES
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    block = tl.program_id(0) * GROUP + row // QUERIES
    n = tl.load(rows_ptr + block, mask=block < M, other=0).to(tl.int32)
    k = row % QUERIES
    there = k < n
    token = tl.load(start_ptr + block, mask=block < M, other=0).to(tl.int64) + tl.where(
        n > QUERIES, k * n // QUERIES, k
    )
    at = q_ptr + batch * stride_b + head * stride_h + token[:, None] * stride_s + column[None, :]
    q = tl.load(at, mask=there[:, None] & (column < D)[None, :], other=0.0)
    wide = q.to(tl.float32)
    squared = wide * wide * square
    if q.dtype == tl.float16:  # which ends there: a little less correction, where a query is as large, and not infinity
        squared = tl.minimum(squared, 65504.0)
    q, q2 = (wide * scale).to(q.dtype), squared.to(q.dtype)
    base = (batch * Hk + head // (H // Hk)) * padded * D
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, N, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        x = scores(q, q2, mean_ptr, variance_ptr, log_rows_ptr, base, j, N, column, D)
        new = tl.maximum(most, tl.max(x, 1))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
        most = new
    weight = tl.where(there, 1.0 / (total * tl.minimum(n, QUERIES)), 0.0)
    mine = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    out = share_ptr + (tl.program_id(1).to(tl.int64) * M + mine[:, None]) * N
    for begin in range(0, N, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        x = scores(q, q2, mean_ptr, variance_ptr, log_rows_ptr, base, j, N, column, D)
        p = tl.exp2(x - most[:, None]) * weight[:, None]
        share = tl.sum(tl.reshape(p, (GROUP, QUERIES, BLOCK_N)), 1)
        tl.store(out + j[None, :], share, mask=(mine < M)[:, None] & (j < N)[None, :])


def launch_config(head_dim: int, itemsize: int, hopper: bool, queries: int) -> dict[str, int]:
    """Queries and key blocks at a time, warps and pipeline stages: what fits into registers, where products hold their queries
    before Hopper, and into the 99 KiB of shared memory that GPUs for consumers have. On an H100 at 115,200 tokens and 24 heads
    of 128: 2.2 ms; 64 key blocks at a time 2.6, 128 2.8."""
    wide = head_dim * itemsize > 256
    if hopper:
        return {"ROWS": ROWS, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2 if wide else 3}
    rows = max(FEWER_ROWS, queries) if wide else ROWS  # queries of one block stay together
    return {"ROWS": rows, "BLOCK_N": 16 if head_dim * itemsize > 128 else 32, "num_warps": 8, "num_stages": 2}


def triton_block_share(
    query: torch.Tensor,
    key_mean: torch.Tensor,
    key_variance: torch.Tensor | None,
    start: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    queries: int,
    key_rows: torch.Tensor,
) -> torch.Tensor:
    """(B, H, Nq, Nk) float32; arguments as in ``block_share``. Means and variances are rounded to query's dtype."""
    B, _, H, D = query.shape
    M, N = len(start), len(key_rows)
    config = launch_config(D, query.element_size(), has_large_memory(query.device), queries)
    means = by_head(key_mean, query.dtype, config["BLOCK_N"])
    variances = None if key_variance is None else by_head(key_variance, query.dtype, config["BLOCK_N"])
    padded = means.shape[2]
    log_rows = key_rows.new_zeros(padded, dtype=torch.float32)
    log_rows[:N] = key_rows.float().log2()
    share = torch.empty((B, H, M, N), dtype=torch.float32, device=query.device)
    if share.numel():
        with torch.cuda.device_of(query):
            block_share_kernel[(triton.cdiv(M, config["ROWS"] // queries), B * H)](
                query, means, variances, log_rows, start, rows, share,
                query.stride(0), query.stride(1), query.stride(2), H, key_mean.shape[2], M, N, padded,
                scale * LOG2E, scale * scale * LOG2E,
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), QUERIES=queries, **config,
            )  # fmt: skip
    return share
