"""The map that most published rules start from: products of the mean query and the mean key of each pair of blocks.

    score[i, j] = scale · q̄ᵢ·k̄ⱼ

The logits beside it, by which recall is estimated, are corrected for the variance of the keys within a block (block_logits.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.selection.block_scores import block_logits
from tilewise.kernels.selection.block_stats import BlockStats, block_stats
from tilewise.plugins.methods.dynamic.block_logits import mean_products, score_variance
from tilewise.plugins.methods.dynamic.map_method import DraftMap, MapMethod


@dataclass(frozen=True)
class MeanMap:
    """The map of a call.

    scores: (B, H, Nq, Nk) float32. query: (B, Nq, H, D) float32, the mean queries. keys: means and variances of the key blocks.
    logits, s2: as of ``DraftMap``.
    """

    scores: torch.Tensor
    query: torch.Tensor
    keys: BlockStats
    logits: torch.Tensor
    s2: torch.Tensor

    def draft(self, scores: torch.Tensor | None = None) -> DraftMap:
        """The map for a rule that goes by ``scores``; None: those of the means."""
        return DraftMap(self.logits, self.keys, self.s2, self.scores if scores is None else scores)


def mean_map(
    layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None
) -> MeanMap:
    """query: (B, Sq, H, D); key: (B, Sk, Hk, D); layouts as of ``MapMethod.draft``."""
    start, rows, _ = layout.block_table(query.device)
    key_start, key_rows, _ = (key_layout or layout).block_table(query.device)
    mean = block_stats(query, start, rows).mean
    keys = block_stats(key, key_start, key_rows, variance=True)
    assert keys.variance is not None
    products, s2 = mean_products(mean, keys.mean), score_variance(mean, keys.variance, scale)
    return MeanMap(scale * products, mean, keys, block_logits(products, s2, key_rows, scale), s2)


@dataclass(frozen=True, kw_only=True)
class MeanDraft(MapMethod):
    """For methods whose rule goes by the products of means alone: ``Candidates.scores``."""

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        return mean_map(layout, query, key, scale, key_layout).draft()
