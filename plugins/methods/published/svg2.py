"""``svg2``: tokens in the order of their clusters, and the blocks of clusters that matter (Sparse VideoGen2, arXiv 2505.18875).

    clusters   k-means of the queries and, by themselves, of the keys of each head, from the means of the step before
    order      queries and keys by their cluster
    choice     as ``draft`` does, over blocks of that order: logit[i, j] = scale · q̄ᵢ·k̄ⱼ + log nⱼ + variance term

A block then holds tokens that are alike, wherever they are in the video, and its mean stands for them. The paper keeps clusters
of any size by a kernel of its own, the best until they hold a share of the mass; here clusters are cut into blocks of the
layout's size, which our kernel runs, and ``recall`` or ``density`` says how much is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod
from tilewise.plugins.methods.dynamic.kmeans import kmeans, spread_over
from tilewise.plugins.methods.dynamic.mean_map import MeanDraft
from tilewise.plugins.methods.dynamic.options import whole_number
from tilewise.plugins.methods.dynamic.reordered import Labels, ReorderedMethod

# Of the paper, 100 clusters of queries and 500 of keys for 118,000 tokens: 9 and 2 blocks of 128 tokens each.
MOST_CLUSTERS, BLOCKS_A_CLUSTER = 512, 4


@register
@dataclass(frozen=True)
class SVG2(ReorderedMethod, MeanDraft, BlockSelectionMethod):
    """Brings the tokens of each head into clusters, and keeps the blocks of clusters that are expected to matter.

    Args:
        clusters: of the queries and of the keys of a head, each. Default: one for four blocks, at most 512.
        rounds: of k-means at each call, at least 1.
        rank: as of draft, but by default always "mass".

    Raises:
        ConfigError: for values that cannot be.
    """

    clusters: int | None = None
    rounds: int = 4

    name: ClassVar[str] = "svg2"
    source: ClassVar[str] = "Sparse VideoGen2, arXiv 2505.18875"
    use: ClassVar[str] = "models whose like tokens lie far apart; planning takes longer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None:
            whole_number(self, "clusters", 1)
        whole_number(self, "rounds", 1)

    @property
    def ranks_by_error(self) -> bool:
        return self.recall is None and self.rank == "error"

    @property
    def keeps_memory(self) -> bool:
        return True

    def labels(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, memory: dict[str, Any]) -> Labels:
        count = self.clusters or max(1, min(MOST_CLUSTERS, layout.blocks // BLOCKS_A_CLUSTER))
        found = []
        for name, x in (("query means", query), ("key means", key)):
            x = x.transpose(1, 2)
            start = memory[name] if name in memory else spread_over(x, min(count, x.shape[2]))
            labels, memory[name] = kmeans(x, start, self.rounds)
            found.append(labels)
        return found[0], found[1]
