"""Attention masks that weigh text tokens down instead of hiding them, as diffusers' ChromaPipeline makes them.

    score(i, j) + c · mᵢ · mⱼ          m: 1 for a visible token, 0 for padding; c is 1 there

A softmax does not mind what all keys of a query share, so to a visible query padding weighs e⁻ᶜ of what it would, and a padding
query sees all keys alike. Both parts need no (S, S) mask:

    visible queries   the method's plan among the visible tokens, merged with attention over the padding, its log-sum-exp
                      lowered by c
    padding queries   plain attention over everything; there are few
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.kernels.attention.lse_merge import attend_with_lse, merge_attention
from tilewise.kernels.plans.layout import Grid, Layout

PAIRS = 1 << 24  # token pairs of a mask that are compared at once


def visible_of(mask: torch.Tensor, batch: int, grid: Grid) -> tuple[torch.Tensor, float] | None:
    """What a mask of this kind shows: (B, S) bool on the CPU, and c > 0; None if it is another kind of mask.

    Args:
        mask: additive floating point, (B, 1, S, S), B may be 1. Reading it waits for the GPU.
        grid: the tokens; padding is text.
    """
    tokens = grid.tokens
    shape = tuple(mask.shape)
    if mask.ndim != 4 or shape[1:] != (1, tokens, tokens) or shape[0] not in (1, batch):
        return None
    if not mask.is_floating_point():
        return None
    diagonal = mask.detach().diagonal(dim1=-2, dim2=-1)[:, 0]
    weight = float(diagonal.max())
    visible = diagonal == weight
    if weight <= 0 or not _is_outer_product(mask[:, 0], visible, weight):
        return None
    if not bool(visible[:, grid.video_start : grid.video_start + grid.video].all()):
        return None
    return visible.expand(batch, tokens).cpu(), weight


def _is_outer_product(mask: torch.Tensor, visible: torch.Tensor, weight: float) -> bool:
    """Whether (B, S, S) ``mask`` is c · mᵢ · mⱼ for (B, S) ``visible``: some rows at a time, as a mask may take gigabytes."""
    rows = max(1, PAIRS // visible.numel())
    same = torch.ones((), dtype=torch.bool, device=mask.device)
    for first in range(0, mask.shape[1], rows):
        part = slice(first, first + rows)
        pairs = visible[:, part, None] & visible[:, None, :]
        same &= (mask[:, part] == pairs.to(mask.dtype) * weight).all()
    return bool(same)


def add_weighed(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    weight: float,
    scale: float | None,
    layout: Layout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What visible queries give to padding, added to what they give to visible tokens.

    Args:
        query: (B, n, H, D), of the visible tokens. keys, values: (B, P, Hk, D), of the padding, Hk dividing H; P ≥ 1.
        out: (B, n, H, D), attention of the visible tokens among themselves, by whatever plan.
        lse: (B, H, n) float32, its log-sum-exp.
        weight: c. scale: of the scores; None: 1 / √D.
        layout: of the call; keeps what this derives from one call to the next.

    Returns:
        The same two, over visible tokens and padding.
    """
    over_padding, padding_lse = attend_with_lse(query, keys, values, scale, keep_with=layout)
    return merge_attention(out, lse, over_padding, padding_lse - weight)


def attend_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Padding queries, (B, P, H, D), over all keys, (B, S, Hk, D), Hk dividing H: to them all keys weigh alike."""
    heads = key.shape[2]
    # Without a mask, the queries of the heads that share a key head are more queries of that head: no key is copied.
    grouped = query.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # (B, Hk, H / Hk, P, D)
    queries, key, value = grouped.flatten(2, 3), key.transpose(1, 2), value.transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, key, value, scale=scale)
    return out.unflatten(2, grouped.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3)
