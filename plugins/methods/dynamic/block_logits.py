"""The draft: how much attention mass a block of queries gives to a block of keys, from their means and variances alone.

    logit[i, j] = scale · q̄ᵢ·k̄ⱼ + log nⱼ + ½ sᵢⱼ²            sᵢⱼ² = scale² · Σ_c q̄ᵢ[c]² · var(Kⱼ)[c]

The first two terms are what n equal keys would get. The third, the second cumulant, is what they get for differing: without it
a draft takes blocks to be flatter than they are, and overestimates what it keeps (on Gaussian blocks of 128 keys with scores
of standard deviation 2: recall 0.906 instead of 0.711). It holds for n keys while s ≤ √(2 log n); beyond that the largest of n
Gaussian scores alone decides, and the term goes on along its tangent:

    s √(2 log n) − log n

so that one odd block with large activations does not win every row (the frozen phase of the random energy model, Derrida 1981).

Where a summary row takes a skipped block's place, it has the block's mass and its mean value, and misses how weights and
values vary together in the block:

    |Σ_k (w_k − w̄) vₖ|  ≤  p · √(e^{s²} − 1) · σ(V)             p: mass, w: weights, σ²: trace of V's variance

That is what a pair is ranked by then. This file has the products; kernels/selection/block_scores.py goes over the maps.
"""

from __future__ import annotations

import torch


def per_query_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, N, Hk, D) → (B, H, N, D): key heads repeated for the query heads that share them."""
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def mean_products(query_mean: torch.Tensor, key_mean: torch.Tensor) -> torch.Tensor:
    """(B, H, Nq, Nk): q̄ᵢ·k̄ⱼ, from block means (B, Nq, H, D) and (B, Nk, Hk, D)."""
    H = query_mean.shape[2]
    return query_mean.transpose(1, 2) @ per_query_head(key_mean, H).transpose(2, 3)


def score_variance(query_mean: torch.Tensor, key_variance: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, H, Nq, Nk): sᵢⱼ², the variance of the scores of query i's mean within key block j."""
    H = query_mean.shape[2]
    squared = (scale * query_mean).square().transpose(1, 2)
    return squared @ per_query_head(key_variance, H).transpose(2, 3)
