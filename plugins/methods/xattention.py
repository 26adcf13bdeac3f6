"""``xattention``: blocks scored by sums over their antidiagonals (XAttention, arXiv 2503.16428).

    score of groups a, b  =  1/s · Σ_{r < s}  q[a·s + s − 1 − r] · k[b·s + r]           s: stride
    mass of a block pair  =  mean over a of  Σ_b softmax_b(scale · score)

s tokens of queries, backwards, against s tokens of keys, forwards: an antidiagonal of each s × s square crosses every row and
every column of it, and so meets what is vertical or slanted in the pattern. It costs 1/s of the products of attention.

A ragged block's last group is filled with the block's own first tokens and weighs only as much as it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod, DraftMap
from tilewise.plugins.methods.dynamic.block_logits import per_query_head

TINY = torch.finfo(torch.float32).tiny
CHUNK_BYTES = 1 << 28  # of scores between groups that are made at once


@register
@dataclass(frozen=True)
class XAttention(BlockSelectionMethod):
    """Keeps the blocks with the highest sums over their antidiagonals.

    The other options are ``BlockSelectionMethod``'s.

    Args:
        stride: tokens of a group, 1 … 64. The paper uses 8 and 16; at 8 the scores alone take half as long as dense attention.
    """

    stride: int = 16

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    use: ClassVar[str] = "choosing as well as draft does or better, where longer planning does not matter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stride, int) or isinstance(self.stride, bool) or not 1 <= self.stride <= 64:
            raise ConfigError(f"xattention: stride must be a whole number from 1 to 64, got {self.stride!r}")

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        B, _, H, _ = query.shape
        at, weight = groups(layout, self.stride, query.device)
        key_at, key_weight = groups(key_layout or layout, self.stride, query.device)
        N, A = weight.shape  # groups of a block, as many as the largest has
        Nk, Ak = key_weight.shape
        keys = per_query_head(key[:, key_at.flatten()], H).unflatten(2, (Nk * Ak, -1)).flatten(3)  # (B, H, Nk·Ak, s·D)
        backwards = query[:, at.flip(-1).flatten()].transpose(1, 2).unflatten(2, (N * A, -1)).flatten(3)
        backwards = backwards * (
            scale / self.stride
        )  # before the products: a sum over stride · D channels may leave float16
        weigh = key_weight.flatten().log()  # −inf where a block has no such group
        rows = max(1, CHUNK_BYTES // (4 * B * H * A * Nk * Ak))  # query blocks at once
        found = []
        for first in range(0, N, rows):
            some = backwards[:, :, first * A : (first + rows) * A]
            scores = (some @ keys.transpose(2, 3)).float() + weigh
            mass = scores.softmax(-1).unflatten(-1, (Nk, Ak)).sum(-1).unflatten(2, (-1, A))
            share = weight[first : first + rows, :, None]
            found.append((mass * share).sum(3) / share.sum(1))
        return DraftMap(torch.cat(found, 2).clamp_min(TINY).log())  # 0 by underflow is little, not never


def groups(layout: Layout, stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, A, stride) int64 tokens of each group of each block, and (N, A) float32, how much of it is the group's own.

    Kept with the layout, and not to be written to.
    """
    return layout.cached(("xattention groups", stride, device), lambda: _groups(layout, stride, device))


def _groups(layout: Layout, stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = layout.block_rows
    A = -(-int(rows.max()) // stride)
    place = torch.arange(A * stride).view(A, stride)
    at = layout.block_start[:, None, None] + place % rows[:, None, None]
    weight = (rows[:, None] - torch.arange(A) * stride).clamp(0, stride) / stride
    with torch.inference_mode(False):
        return at.to(device), weight.to(device)
