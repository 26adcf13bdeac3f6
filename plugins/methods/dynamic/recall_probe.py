"""Exact recall on a few queries: what a plan keeps, measured and not estimated.

    recall(s) = Σ over kept keys of softmax(scale · q[s]·k)          for P queries, spread evenly over the sequence

Within a window both, what is kept and what there is, are counted in the window alone.

The mean of a few dozen queries says whether the draft's estimate can be trusted. Each reads all keys, in float32: for looking
into a method, not for every run.
"""

from __future__ import annotations

import torch

from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.windowed_selection import Bounds


def probe_rows(tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """(P,) int64: ``count`` (or all) positions, spread evenly."""
    count = min(count, tokens)
    return (torch.arange(count, device=device) * 2 + 1) * tokens // (2 * count)


def exact_recall(
    query: torch.Tensor,
    key: torch.Tensor,
    kept: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    at: torch.Tensor,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """(B, H, P) float32: attention mass that queries ``at`` keep.

    Args:
        query: (B, Sq, H, D). key: (B, Sk, Hk, D). kept: (B, H, Nq, Nk) bool. rows: (Nq,) and (Nk,) tokens of each block of
            queries and keys. at: (P,) int64.
        bounds: the window that the method is bound to.
    """
    H = query.shape[2]
    of_query, of_key = (
        torch.repeat_interleave(n.long(), output_size=x.shape[1]) for n, x in zip(rows, (query, key), strict=True)
    )
    picked = query[:, at].float().transpose(1, 2)
    scores = scale * (picked @ per_query_head(key, H).float().transpose(2, 3))
    seen = kept.expand(query.shape[0], H, -1, -1)[:, :, of_query[at]][..., of_key]
    if bounds is not None:
        scores = scores.masked_fill(~bounds.visible(at, of_query, of_key, H), -torch.inf)
    return (scores.softmax(-1) * seen).sum(-1)
