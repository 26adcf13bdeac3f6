"""``moba``: a gate that scores whole blocks, and the k best of each query block (MoBA, arXiv 2502.13189).

    gate[i, j] = q̄ᵢ·k̄ⱼ                       kept: the block itself, and the best of the others, k in all

In the paper each query has its own choice. A kernel's block of queries has one: that of the mean query, whose gate is the mean
of theirs. k = ⌊density · blocks⌉ is the same for every query block and head. The paper leaves the rest out
(``compensate=False``); by default summary rows stand for it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates
from tilewise.plugins.methods.dynamic.mean_map import MeanDraft
from tilewise.plugins.methods.dynamic.selection import topk


@register
@dataclass(frozen=True)
class MoBA(MeanDraft, DensityMethod):
    """Keeps the key blocks with the highest products of mean query and mean key, equally many for each query block."""

    name: ClassVar[str] = "moba"
    source: ClassVar[str] = "MoBA, arXiv 2502.13189"
    use: ClassVar[str] = "models trained with MoBA, and the simplest rule to compare others with"

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None and self.density is not None
        gate = c.scores.masked_fill(c.logits == -torch.inf, -torch.inf)
        return topk(gate, c.always, c.density_of_rows(self.density))
