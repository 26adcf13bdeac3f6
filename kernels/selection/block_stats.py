"""What a block of tokens is on average: the draft that dynamic methods plan by.

    mean[b, i, h] = 1/nᵢ · Σ x[b, s, h]          over the nᵢ tokens s of block i
    var[b, i, h]  = 1/nᵢ · Σ (x[b, s, h] − mean)²

Blocks have the rows that they have: a ragged border block is averaged over those, and not over padding. One pass over x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.kernels.device import FLOATS, runs_triton


@dataclass(frozen=True)
class BlockStats:
    """mean: (B, N, H, D) float32, or as asked for. variance: float32, the same of the population variance per channel, or None if
    not asked for."""

    mean: torch.Tensor
    variance: torch.Tensor | None


def block_stats(
    x: torch.Tensor,
    start: torch.Tensor,
    rows: torch.Tensor,
    *,
    variance: bool = False,
    usual: int = 128,
    dtype: torch.dtype | None = None,
) -> BlockStats:
    """Mean, and if asked variance, of each block of tokens.

    Args:
        x: (B, S, H, D) float16, bfloat16 or float32 with contiguous D ≤ 256; any other strides.
        start, rows: (N,) first token and number of tokens (at least 1) of each block, on x's device: see ``Layout.block_table``.
        variance: whether the variance is wanted too.
        usual: tokens that most blocks have: how many rows a kernel reads at once.
        dtype: of the mean; None: float32.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: another dtype.
    """
    if x.ndim != 4 or x.shape[3] > 256 or x.stride(3) != 1:
        raise ValueError(f"block_stats: x must be (B, S, H, D) with contiguous D of at most 256, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"block_stats: x must be float16, bfloat16 or float32, got {x.dtype}")
    if start.shape != rows.shape or start.ndim != 1 or not x.device == start.device == rows.device:
        raise ValueError(
            f"block_stats: start and rows must be (N,) on {x.device}, got {tuple(start.shape)} on {start.device} and "
            f"{tuple(rows.shape)} on {rows.device}"
        )
    if runs_triton(x.device):
        from tilewise.kernels.selection.triton_block_stats import triton_block_stats

        return BlockStats(*triton_block_stats(x, start, rows, variance, usual, dtype or torch.float32))
    stats = block_stats_reference(x, start, rows, variance)
    return stats if dtype is None else BlockStats(stats.mean.to(dtype), stats.variance)


def block_stats_reference(x: torch.Tensor, start: torch.Tensor, rows: torch.Tensor, variance: bool) -> BlockStats:
    """The naive formula, in float32 or in x's float64."""
    x = x if x.dtype == torch.float64 else x.float()
    offsets = torch.arange(int(rows.max()) if len(rows) else 0, device=x.device)
    there = (offsets < rows[:, None])[None, :, :, None, None]
    # Rows that a block does not have are read from its first, and masked.
    at = torch.where(offsets < rows[:, None], start[:, None] + offsets, start[:, None])
    blocks = x[:, at].masked_fill(~there, 0)  # (B, N, rows, H, D)
    count = rows.to(x.dtype)[:, None, None]
    mean = blocks.sum(2) / count
    if not variance:
        return BlockStats(mean, None)
    away = (blocks - mean[:, :, None]).masked_fill(~there, 0)
    return BlockStats(mean, away.square().sum(2) / count)
