"""``sol``: key blocks whose score is far above the mean of their row (Sol-Attn, arXiv 2607.24027).

    s[i, j]  = scale · q̄ᵢ·k̄ⱼ
    kept     : s[i, j] > meanⱼ s[i, j] + τ · σᵢ

    σᵢ²      = Σ_c (scale · q̄ᵢ[c])² · varⱼ(k̄ⱼ[c])        spread="diag"     channels taken to be independent
             = varⱼ s[i, j]                              spread="exact"

means and variances over the video's key blocks, which count alike. A row with a few blocks that stand out keeps those; a flat one
keeps what noise puts above. What is not kept is pooled: one summary row a block. With a ``density``, τ is the one by which as
many pairs of all heads together are kept.

Other than in the paper: blocks are tiles of the grid and have up to 128 tokens, not 64; of the band of blocks that are kept in
any case, the default is the block itself; summary rows are corrected for variance; a row keeps at least its best block.
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
from tilewise.plugins.methods.dynamic.options import is_number, one_of
from tilewise.plugins.methods.dynamic.selection import best_of_row, best_scores

TINY = 1e-6  # added to variances, as in the paper's code


@register
@dataclass(frozen=True)
class Sol(DensityMethod):
    """Keeps the key blocks whose score lies τ standard deviations above the mean of their row.

    Args:
        tau: instead of ``density``: τ; the paper uses 1 to 2. Higher keeps less.
        spread: "diag" or "exact": see the module's docstring.

    Raises:
        ConfigError: for values that cannot be.
    """

    tau: float | None = None
    spread: str = "diag"

    name: ClassVar[str] = "sol"
    source: ClassVar[str] = "Sol-Attn, arXiv 2607.24027"
    use: ClassVar[str] = "clips whose heads need different shares: each row keeps what stands out of it"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density", "tau"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not is_number(self.tau):
            raise ConfigError(f"sol: tau must be a number, got {self.tau!r}")
        one_of(self.name, "spread", self.spread, ("diag", "exact"))

    def refuses_some_heads(self) -> str | None:
        if self.density is not None:
            return "density chooses one tau for all heads, and each rank has some; give tau"
        return super().refuses_some_heads()

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        text = (key_layout or layout).block_table(query.device)[2]
        video = (~text).float()
        count = video.sum()
        mean = (means.scores * video).sum(-1, keepdim=True) / count
        if self.spread == "exact":
            variance = ((means.scores - mean).square() * video).sum(-1, keepdim=True) / count
        else:
            weight = video[:, None, None]
            keys = means.keys.mean
            middle = (keys * weight).sum(1, keepdim=True) / count
            spread = ((keys - middle).square() * weight).sum(1, keepdim=True) / count  # (B, 1, Hk, D)
            squared = (scale * means.query).square().transpose(1, 2)
            variance = squared @ per_query_head(spread, query.shape[2]).transpose(2, 3)
        return means.draft((means.scores - mean) / (variance + TINY).sqrt())

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None
        scores = c.scores.masked_fill(c.logits == -torch.inf, -torch.inf)
        if self.tau is None:
            assert self.density is not None
            return best_scores(scores, c.always, (c.rows, c.key_rows), self.density, across_heads=True)
        kept = (scores > self.tau) | c.always
        return kept | best_of_row(scores, kept)
