"""The oracle: naive masked attention in high precision. Everything else is compared with this."""

from __future__ import annotations

import math

import torch


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v over the visible keys, and its log-sum-exp.

    Args:
        q: (B, Sq, H, D). k, v: (B, Sk, Hk, D) with Hk dividing H (grouped-query attention).
        mask: bool, True = visible, broadcastable to (B, H, Sq, Sk); None: everything is visible.
        scale: default 1/√D.
        dtype: the precision to compute in.

    Returns:
        out (B, Sq, H, D) and lse (B, H, Sq), both in ``dtype``. A row without visible keys has out 0 and lse −inf.
    """
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return (weights @ v).transpose(1, 2), lse
