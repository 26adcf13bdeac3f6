"""``flexprefill``: a pattern for each head, by what holds a share of the mass (FlexPrefill, arXiv 2502.20766).

The queries Q̂ of one block, the middle one, are compared with all keys:

    p̂[j] = mean over Q̂ of Σ_{k in j} softmax(scale · q·k)        p̄[j] = softmaxⱼ(scale · q̄·k̄ⱼ)
    √ JS(p̂, p̄) < threshold   →   query-aware: the map of the means is trusted, its pairs are taken by their mass
    otherwise               →   vertical-slash: columns j by p̂[j], and diagonals j − i by p̂ there; a pair by the better of both

Taken are the fewest that hold ``gamma`` of the mass: of all pairs of the head, or of the columns and of the diagonals each. With
a ``density``, each head has the gamma by which it keeps so many pairs.

Other than in the paper: Q̂ is not the last block, as attention is not causal; diagonals are of blocks, and those that Q̂ does
not reach are not taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.mean_map import mean_map
from tilewise.plugins.methods.dynamic.options import fraction, is_number
from tilewise.plugins.methods.dynamic.selection import best_of_row, best_scores


@register
@dataclass(frozen=True)
class FlexPrefill(DensityMethod):
    """Gives each head the pattern that fits it, from the map of means or from columns and diagonals.

    Args:
        gamma: instead of ``density``: share of the mass to keep, in (0, 1]; the paper's is 0.9 to 0.95.
        threshold: largest root of the Jensen–Shannon divergence, in [0, 1], up to which a head goes by the map of means; the
            paper's is 0.1.

    Raises:
        ConfigError: for values that cannot be.
    """

    gamma: float | None = None
    threshold: float = 0.1

    name: ClassVar[str] = "flexprefill"
    source: ClassVar[str] = "FlexPrefill, arXiv 2502.20766"
    use: ClassVar[str] = "models with heads along columns and diagonals beside heads that go by content"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density", "gamma"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            fraction(self, "gamma")
        if not (is_number(self.threshold) and 0 <= self.threshold <= 1):
            raise ConfigError(f"flexprefill: threshold must be in [0, 1], got {self.threshold!r}")

    def refuses_window(self) -> str | None:
        return "its diagonals are of one sequence, and not of a KV cache beside it"

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        middle = int((~layout.is_text).nonzero().flatten().median())
        exact = exact_share(layout, middle, query, key, scale)  # (B, H, N)
        pooled = means.scores.softmax(-1)
        trusted = divergence(exact, pooled[:, :, middle]).sqrt() < self.threshold
        by_content = mass_before(pooled.flatten(2) / layout.blocks).view_as(pooled)
        number = torch.arange(layout.blocks, device=query.device)
        seen = number[None, :] - number[:, None] + middle  # the column of Q̂'s row that lies on the same diagonal
        there = (seen >= 0) & (seen < layout.blocks)
        along = mass_before(exact)
        diagonals = along[..., seen.clamp(0, layout.blocks - 1)].masked_fill(~there, torch.inf)
        by_pattern = torch.minimum(along[:, :, None], diagonals)
        return means.draft(-torch.where(trusted[..., None, None], by_content, by_pattern))

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None
        scores = c.scores.masked_fill(c.logits == -torch.inf, -torch.inf)
        if self.gamma is None:
            assert self.density is not None
            return best_scores(scores, c.always, (c.rows, c.key_rows), self.density, across_heads=False)
        kept = (scores > -self.gamma) | c.always
        return kept | best_of_row(c.logits, kept)


def exact_share(layout: Layout, block: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, H, N) float32: the attention mass that the queries of a block give to each key block, exactly, in the mean."""
    first, rows = int(layout.block_start[block]), int(layout.block_rows[block])
    picked = query[:, first : first + rows].float().transpose(1, 2)
    mass = (scale * (picked @ per_query_head(key, query.shape[2]).float().transpose(2, 3))).softmax(-1).mean(2)
    of_key = torch.repeat_interleave(layout.block_table(query.device)[1].long(), output_size=key.shape[1])
    share = torch.zeros(*mass.shape[:2], layout.blocks, device=mass.device)
    return share.scatter_add_(-1, of_key.expand_as(mass), mass)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence of distributions over the last axis, in bits: in [0, 1]."""
    middle = (p + q) / 2

    def relative(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x * (x / middle).log2(), 0).sum(-1)

    return ((relative(p) + relative(q)) / 2).clamp(0, 1)


def mass_before(mass: torch.Tensor) -> torch.Tensor:
    """For each entry of the last axis, the mass of those that come before it by falling mass."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(mass).scatter_(-1, order, ordered.cumsum(-1) - ordered)
