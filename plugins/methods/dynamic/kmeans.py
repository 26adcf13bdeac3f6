"""k-means over the tokens of each head: Lloyd's algorithm, a fixed number of rounds, nothing waits for the device.

label[s]    = argmin_c |x[s] − m_c|²           m_c = mean of the x[s] with label c; an empty cluster keeps its mean
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 1 << 28  # of distances that are made at once


def kmeans(x: torch.Tensor, start: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels (B, H, S) int64, means (B, H, C, D) float32) of tokens x (B, H, S, D), from the means ``start`` on.

    rounds: how often means are made, at least 1; the labels are those of the last means.
    """
    means = start
    for _ in range(rounds):
        labels = nearest(x, means)
        sums, counts = torch.zeros_like(means), torch.zeros(means.shape[:3], dtype=means.dtype, device=x.device)
        sums.scatter_add_(2, labels[..., None].expand_as(x), x.to(means.dtype))
        counts.scatter_add_(2, labels, torch.ones((), dtype=means.dtype, device=x.device).expand(labels.shape))
        means = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), means)
    return nearest(x, means), means


def nearest(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """(B, H, S) int64: the number of the nearest mean of each token."""
    size = means.square().sum(-1)[:, :, None]
    B, H, S, _ = x.shape
    rows = max(1, CHUNK_BYTES // (4 * B * H * means.shape[2]))
    found = [
        (size - 2 * (part.to(means.dtype) @ means.transpose(2, 3))).argmin(-1) for part in x.split(min(rows, S), dim=2)
    ]
    return torch.cat(found, 2)


def spread_over(x: torch.Tensor, count: int) -> torch.Tensor:
    """(B, H, count, D) float32: tokens of x (B, H, S, D) at even distances in their order, to start from."""
    at = (torch.arange(count, device=x.device) * 2 + 1) * x.shape[2] // (2 * count)
    return x[:, :, at].float()
