"""``routing``: queries see the keys of their own cluster (Routing Transformer, arXiv 2003.05997).

    clusters    k-means of queries and keys together, of unit length, one set for each key head
    order       queries and keys by their cluster
    score[i, j] = Σ_c  (share of block i in cluster c) · (share of block j in c)      ties: the nearer in the order

and each query block keeps the best until there are as many as ``density`` says. In the paper the clusters are learned, and each
takes equally many of the tokens nearest to its mean; here they are found at each step, from those of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import normalize

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.kmeans import kmeans, spread_over
from tilewise.plugins.methods.dynamic.map_method import Candidates
from tilewise.plugins.methods.dynamic.mean_map import MeanDraft
from tilewise.plugins.methods.dynamic.options import whole_number
from tilewise.plugins.methods.dynamic.reordered import Labels, ReorderedMethod, band
from tilewise.plugins.methods.dynamic.selection import select


@register
@dataclass(frozen=True)
class Routing(ReorderedMethod, MeanDraft, DensityMethod):
    """Brings the queries and keys of each head into common clusters, and keeps the pairs of the same cluster.

    Args:
        clusters: of a head, at least 1.
        rounds: of k-means at each call, at least 1.

    Raises:
        ConfigError: for values that cannot be.
    """

    clusters: int = 16
    rounds: int = 4

    name: ClassVar[str] = "routing"
    source: ClassVar[str] = "Routing Transformer, arXiv 2003.05997"
    use: ClassVar[str] = "comparing clusters alone, without scores, with what chooses by scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self, "clusters", 1)
        whole_number(self, "rounds", 1)

    @property
    def keeps_memory(self) -> bool:
        return True

    def labels(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, memory: dict[str, Any]) -> Labels:
        B, V, H, D = query.shape
        heads = key.shape[2]
        together = torch.cat(
            [query.view(B, V, heads, -1, D).permute(0, 2, 3, 1, 4).flatten(2, 3), key.transpose(1, 2)], 2
        )
        together = normalize(together.float(), dim=-1)
        start = memory["means"] if "means" in memory else spread_over(together, min(self.clusters, together.shape[2]))
        labels, memory["means"] = kmeans(together, start, self.rounds)
        return labels[:, :, :-V].reshape(B, H, V), labels[:, :, -V:]

    def choose_by(self, candidates: Candidates, labels: Labels) -> torch.Tensor:
        c = candidates
        assert self.density is not None
        of_query, of_key = (self._shares(c.layout, each) for each in labels)
        of_key = of_key.repeat_interleave(of_query.shape[1] // of_key.shape[1], 1)
        same = of_query @ of_key.transpose(2, 3)
        near = band(c.layout, same.device) / c.layout.blocks
        return select("rows", same + 1e-4 * near, c.always, c.key_rows, density=c.density_of_rows(self.density))

    def _shares(self, layout: Layout, labels: torch.Tensor) -> torch.Tensor:
        """(B, H, N, clusters) float32: the share of each block's tokens in each cluster; 0 for text."""
        rows = layout.block_table(labels.device)[1]
        of_block = torch.repeat_interleave(rows.long(), output_size=layout.grid.tokens)
        first = layout.grid.text if layout.grid.text_first else 0
        place = of_block[first : first + layout.grid.video] * self.clusters + labels
        shares = torch.zeros(*labels.shape[:2], layout.blocks * self.clusters, device=labels.device)
        shares.scatter_add_(-1, place, torch.ones((), device=labels.device).expand(place.shape))
        return shares.unflatten(-1, (layout.blocks, self.clusters)) / rows[:, None]
