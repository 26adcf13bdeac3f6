"""Exact recall on a few queries: what a plan keeps, measured and not estimated.

    recall(s) = Σ over kept keys of softmax(scale · q[s]·k)          for P queries, spread evenly over the sequence

It reads all keys for P queries, so a few dozen cost little, and their mean says whether the draft's estimate can be trusted.
"""

from __future__ import annotations

import torch

from tilewise.plugins.methods.draft_logits import per_query_head


def probe_rows(tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """(P,) int64: ``count`` (or all) positions, spread evenly."""
    count = min(count, tokens)
    return (torch.arange(count, device=device) * 2 + 1) * tokens // (2 * count)


def exact_recall(
    query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, scale: float, at: torch.Tensor
) -> torch.Tensor:
    """(B, H, P) float32: attention mass that queries ``at`` keep.

    Args:
        query: (B, S, H, D). key: (B, S, Hk, D). kept: (B, H, N, N) bool. rows: (N,) tokens of each block. at: (P,) int64.
    """
    H = query.shape[2]
    of_token = torch.repeat_interleave(rows.long(), output_size=query.shape[1])
    picked = query[:, at].float().transpose(1, 2)
    scores = scale * (picked @ per_query_head(key, H).float().transpose(2, 3))
    seen = kept.expand(query.shape[0], H, -1, -1)[:, :, of_token[at]][..., of_token]
    return (scores.softmax(-1) * seen).sum(-1)
