"""What the best pairs of blocks are: each head may have a ranking of its own.

    rank[i, j] = mass or error[i, j]  +  bonus · [j is i, or shares a face with it]

mass: log of the attention mass that a block is expected to hold. error: log of the error that its mean would make in its place
(kernels/selection/block_scores.py). Means of blocks know nothing of how neighbours resemble each other token by token: local
heads find more with a bonus. (One without limit, a window of the nearest tiles, found no more on the demo model.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.plugins.methods.dynamic.always_keep import always_kept
from tilewise.plugins.methods.dynamic.map_method import Candidates


@dataclass(frozen=True)
class Ranking:
    """by_error: rank by the error, and not by the mass. bonus: of neighbours, natural log."""

    by_error: bool
    bonus: float


RANKINGS = (Ranking(True, 0.0), Ranking(False, 0.0), Ranking(True, 1.0))


def rank(candidates: Candidates, ranking: Ranking, blocks: torch.Tensor) -> torch.Tensor:
    """(B, H, P, Nk) float32: the ranks of some query blocks. blocks: (P,) int64."""
    found = (candidates.ranked if ranking.by_error else candidates.logits)[:, :, blocks]
    return found + ranking.bonus * _near(candidates)[blocks] if ranking.bonus else found


def rank_by_head(candidates: Candidates, which: torch.Tensor) -> torch.Tensor:
    """(B, H, Nq, Nk) float32. which: (B, H) int64, the number of each head's ranking."""
    by_error, bonus = _options(candidates, which.device)
    found = torch.where(by_error[which][..., None, None], candidates.ranked, candidates.logits)
    return found + bonus[which][..., None, None] * _near(candidates)


def _near(candidates: Candidates) -> torch.Tensor:
    """(Nq, Nk) bool: a block itself, and those of tiles that share a face with its own."""
    return always_kept(candidates.layout, ("self", "neighbours"), candidates.logits.device)


def _options(candidates: Candidates, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(rankings,) bool and float32, their options; kept with the layout."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode(False):
            by_error = torch.tensor([ranking.by_error for ranking in RANKINGS], device=device)
            return by_error, torch.tensor([ranking.bonus for ranking in RANKINGS], device=device)

    return candidates.layout.cached(("rankings", device), make)
