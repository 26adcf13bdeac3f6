"""What share of its attention does a block of queries give to each block of keys, as the means of the keys expect it?

    x[s, j]      = scale · q_s·k̄ⱼ + log nⱼ + c(σ²[s, j])           σ²[s, j] = Σ_d (scale · q_s[d])² · var(Kⱼ)[d]
    share[i, j]  = mean over queries s of block i of  softmax_j x[s, j]

at most ``QUERIES`` of a block, evenly spread over it. c is the correction for keys that differ within their block
(plugins/methods/dynamic/block_logits.py): σ²/2, along its tangent
σ √(2 log n) − log n beyond σ² = 2 log n. Without variances it is 0.

Queries are drafted by themselves, and not the mean of their block: a mean query is more certain of where to look than its tokens
are. A quarter of them is as unbiased as all are. Their scores against all block means never leave the chip.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import FLOATS, runs_triton
from tilewise.kernels.selection.block_scores import variance_term

QUERIES = 32  # of a block that are drafted; a power of two
CHUNK = 2048  # queries that the CPU path scores at a time


def block_share(
    query: torch.Tensor,
    key_mean: torch.Tensor,
    key_variance: torch.Tensor | None,
    start: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    queries: int = QUERIES,
    key_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The map of block pairs; see the module's docstring.

    Args:
        query: (B, S, H, D) float16, bfloat16 or float32 with contiguous D ≤ 256; any other strides.
        key_mean: (B, Nk, Hk, D) float32, contiguous; Hk divides H. key_variance: the same, or None.
        start, rows: (Nq,) first token and number of tokens (1 … 128) of each query block, on query's device: see
            ``Layout.block_table``.
        scale: of the scores.
        queries: how many of a block are drafted: a power of two, 1 … 128. Blocks with fewer are drafted whole.
        key_rows: (Nk,) tokens of each key block; None: queries and keys have the same blocks.

    Returns:
        (B, H, Nq, Nk) float32: rows sum to 1. nan where a drafted query of the block, or a key, is not finite.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: another dtype.
    """
    if query.ndim != 4 or query.shape[3] > 256 or query.stride(3) != 1:
        raise ValueError(
            f"block_share: query must be (B, S, H, D) with contiguous D of at most 256, got {tuple(query.shape)}"
        )
    if query.dtype not in FLOATS:
        raise TypeError(f"block_share: query must be float16, bfloat16 or float32, got {query.dtype}")
    B, _, H, D = query.shape
    key_rows = rows if key_rows is None else key_rows
    N = len(key_rows)
    for name, x in (("key_mean", key_mean), ("key_variance", key_variance)):
        if x is None:
            continue
        good = x.ndim == 4 and x.shape[:2] == (B, N) and x.shape[3] == D and H % x.shape[2] == 0
        if not good or x.shape != key_mean.shape or not x.is_contiguous() or x.dtype != torch.float32:
            raise ValueError(
                f"block_share: {name} must be contiguous float32 ({B}, {N}, Hk, {D}) with Hk dividing {H}, got "
                f"{tuple(x.shape)} {x.dtype}"
            )
    devices = {x.device for x in (query, key_mean, start, rows, key_rows)}
    if rows.shape != start.shape or rows.ndim != 1 or key_rows.ndim != 1 or len(devices) > 1:
        raise ValueError(
            f"block_share: needs rows ({len(start)},) and key_rows (Nk,), all on {query.device}, got {tuple(rows.shape)}, "
            f"key_mean on {key_mean.device}, start on {start.device}, rows on {rows.device} and key_rows on {key_rows.device}"
        )
    if not 1 <= queries <= 128 or queries & (queries - 1):
        raise ValueError(f"block_share: queries must be a power of two of at most 128, got {queries}")
    if runs_triton(query.device):
        from tilewise.kernels.selection.triton_block_share import triton_block_share

        return triton_block_share(query, key_mean, key_variance, start, rows, scale, queries, key_rows)
    return torch_block_share(query, key_mean, key_variance, start, rows, scale, queries, key_rows)


def torch_block_share(
    query: torch.Tensor,
    key_mean: torch.Tensor,
    key_variance: torch.Tensor | None,
    start: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    queries: int = QUERIES,
    key_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula as it stands, some queries at a time; in float32, or in query's float64."""
    B, _, H, _ = query.shape
    key_rows = rows if key_rows is None else key_rows
    N, dtype = len(start), torch.promote_types(query.dtype, torch.float32)
    # The drafted tokens one block after another, and the block of each: blocks may lie anywhere.
    taken = rows.clamp(max=queries)
    block = torch.repeat_interleave(torch.arange(N, device=query.device), taken)
    number = torch.arange(len(block), device=query.device) - (taken.cumsum(0) - taken)[block]
    token = start.long()[block] + number * rows[block] // taken[block]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).repeat_interleave(H // x.shape[2], 2).permute(0, 2, 3, 1)  # (B, H, D, Nk)

    mean, variance = by_head(key_mean), None if key_variance is None else by_head(key_variance)
    log_rows = key_rows.to(dtype).log()
    share = torch.zeros(B, H, N, len(key_rows), dtype=dtype, device=query.device)
    for part, of in zip(token.split(CHUNK), block.split(CHUNK), strict=True):
        q = scale * query[:, part].to(dtype).transpose(1, 2)
        x = q @ mean + log_rows
        if variance is not None:
            x = x + variance_term(q.square() @ variance, key_rows.to(dtype))
        share.index_add_(2, of, x.softmax(-1))
    return share / taken[:, None]
