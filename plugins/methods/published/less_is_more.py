"""``less-is-more``: one choice for all heads of a layer (LessIsMore, arXiv 2508.07101).

    rank_h[i, j]   place of key block j among the scores of query block i in head h, from 0
    order of j     by  min over h of rank_h[i, j],  ties by the higher mean over heads of the expected attention mass
    kept           the ⌊recent · k⌉ blocks nearest to i, then by that order, k = ⌊density · blocks⌉ in all

so the first choice of every head comes before any head's second. The paper is about decoding text, where ``recent`` are the last
tokens; here they are the blocks nearest in time, height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.always_keep import nearness
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates
from tilewise.plugins.methods.dynamic.mean_map import MeanDraft
from tilewise.plugins.methods.dynamic.options import is_number
from tilewise.plugins.methods.dynamic.selection import topk


@register
@dataclass(frozen=True)
class LessIsMore(MeanDraft, DensityMethod):
    """Keeps the same key blocks in all heads: the first choices of each head, and the nearest blocks.

    Args:
        recent: share of the kept blocks that are the nearest ones, in [0, 1]; the paper's is 0.25.

    Raises:
        ConfigError: for values that cannot be.
    """

    recent: float = 0.25

    name: ClassVar[str] = "less-is-more"
    source: ClassVar[str] = "LessIsMore, arXiv 2508.07101"
    use: ClassVar[str] = "layers whose heads look at the same places; one list of blocks serves all of them"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.recent) and 0 <= self.recent <= 1):
            raise ConfigError(f"less-is-more: recent must be in [0, 1], got {self.recent!r}")

    def refuses_some_heads(self) -> str | None:
        return "its heads choose together, and each rank has some of them"

    def refuses_window(self) -> str | None:
        return "its nearest blocks are those of one grid, and not of a KV cache"

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None and self.density is not None
        density = c.density_of_rows(self.density)
        near = nearness(c.layout, c.logits.device) < round(self.recent * density * c.layout.blocks)
        score = c.scores.masked_fill(c.logits == -torch.inf, -torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).amin(1, keepdim=True)
        # A mean of masses is at most 1, and half of it decides between equal ranks alone.
        order = c.logits.softmax(-1).mean(1, keepdim=True) / 2 - rank
        order = order.masked_fill((score == -torch.inf).all(1, keepdim=True), -torch.inf)
        return topk(order, c.always | near, density).expand_as(c.logits)
