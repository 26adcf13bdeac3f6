"""``hip``: a search down a tree of ranges of key blocks, the best k of each level (HiP attention, arXiv 2406.09827).

    k ranges of equal length cover the key blocks; then, until each range is one block:
        halve every range                        2k ranges
        score[range] = scale · q̄ᵢ·k̄ of the block in its middle
        keep the k best

A range is judged by one block, taken to be like its neighbours in the token order, so a row reads about 2k log₂(N / k) scores of
N. k = ⌊density · N⌉. The blocks kept in any case come first, then what the tree found, the best first. In the paper a range is
represented by the key of a token, here by the mean key of a block. The map of all pairs is made all the same, as summary rows
need it; the choice reads only what the tree does.
"""

from __future__ import annotations

import math
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
class HiP(MeanDraft, DensityMethod):
    """Finds the best key blocks of each query block by a search down a tree of ranges."""

    name: ClassVar[str] = "hip"
    source: ClassVar[str] = "HiP attention, arXiv 2406.09827"
    use: ClassVar[str] = "comparing a search that reads few scores with those that read all"

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None and self.density is not None
        density = c.density_of_rows(self.density)
        text = c.keys.is_text
        first = 0 if not bool(text[0]) else int(text.sum())
        leaves = tree_search(c.scores, first, int((~text).sum()), max(1, round(density * c.keys.blocks)))
        found = torch.zeros_like(c.logits, dtype=torch.bool).scatter_(-1, leaves, True)
        return topk(c.scores.masked_fill(~found | (c.logits == -torch.inf), -torch.inf), c.always, density)


def tree_search(scores: torch.Tensor, first: int, count: int, k: int) -> torch.Tensor:
    """(B, H, Nq, k) int64: the key blocks that the search finds for each row of scores (B, H, Nq, Nk), among ``count`` blocks
    from ``first`` on. k is lowered to their number."""
    k = min(k, count)
    edges = torch.arange(k + 1, device=scores.device) * count // k + first
    begin, end = (x.expand(*scores.shape[:-1], k) for x in (edges[:-1], edges[1:]))
    for _ in range(math.ceil(math.log2(math.ceil(count / k)))):
        middle = (begin + end + 1) // 2
        begins, ends = torch.cat([begin, middle], -1), torch.cat([middle, end], -1)
        at = ((begins + ends) // 2).clamp(max=first + count - 1)
        score = scores.gather(-1, at).masked_fill(begins >= ends, -torch.inf)  # a range of one block has no second half
        best = score.topk(k, dim=-1).indices
        begin, end = begins.gather(-1, best), ends.gather(-1, best)
    return begin
