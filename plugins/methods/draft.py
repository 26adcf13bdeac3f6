"""``draft``: the model's own low-resolution map decides which key blocks a query block sees (arXiv 2505.14708).

Queries and keys are averaged over the blocks of the layout; the attention of the averages, corrected for how keys differ within
a block (draft_logits.py), says what each block would look at. It is made per head, sample and step, and costs 1/128² of
attention.

Other than in the paper: any grid (border blocks are averaged over the tokens that they have), no query block is ever left
without keys, pairs are ranked by the error that skipping them makes, and what is skipped is not dropped: one summary row a
block stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from tilewise.kernels.block_stats import block_stats
from tilewise.kernels.dynamic_plan import block_table
from tilewise.kernels.layout import MAX_BLOCK_ROWS, Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.draft_logits import mean_logits, score_variance, variance_term
from tilewise.plugins.methods.guided import DraftMap, Guided

PIECES = 8  # of a query block, where a recall is asked for


@register
@dataclass(frozen=True)
class Draft(Guided):
    """Draft-guided sparse attention; the other options are ``Guided``'s.

    Args:
        variance: correct the map for the variance of keys within a block. False: means alone, as in the paper.
        split: pieces of a query block that are drafted one by one, and their attention averaged: one mean query is more certain
            of where to look than its tokens are, and its recall too good. Default: 8 for a ``recall``; 1 for a ``density``,
            where only the ranking counts, and hardly changes.

    Raises:
        ConfigError: for values that cannot be.
    """

    variance: bool = True
    split: int | None = None

    name: ClassVar[str] = "draft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.variance, bool):
            raise ConfigError(f"draft: variance must be true or false, got {self.variance!r}")
        whole = isinstance(self.split, int) and not isinstance(self.split, bool)
        if self.split is not None and not (whole and 1 <= self.split <= MAX_BLOCK_ROWS):
            raise ConfigError(f"draft: split must be a whole number from 1 to {MAX_BLOCK_ROWS}, got {self.split!r}")

    def draft(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float) -> DraftMap:
        start, rows, _ = block_table(layout, query.device)
        wanted = self.variance or self.compensates or self.ranks_by_error
        keys = block_stats(key, start, rows, variance=wanted)
        split = self.split or (1 if self.recall is None else PIECES)
        size = -(-int(layout.block_rows.max()) // split)
        first, count, weight = pieces(layout, size, query.device)
        means = block_stats(query, first.flatten(), count.flatten()).mean.unflatten(1, tuple(first.shape))
        share = torch.zeros((), device=query.device)
        for piece in range(first.shape[1]):
            one = means[:, :, piece]
            logits = mean_logits(one, keys.mean, rows, scale)
            s2 = None if keys.variance is None else score_variance(one, keys.variance, scale)
            if self.variance and s2 is not None:
                logits = logits + variance_term(s2, rows)
            if first.shape[1] == 1:
                return DraftMap(logits, None if s2 is None else keys, s2)
            share = share + weight[:, piece, None] * logits.softmax(-1)
        return DraftMap(share.clamp_min(torch.finfo(torch.float32).tiny).log(), None if keys.variance is None else keys)


@lru_cache(maxsize=32)
def pieces(layout: Layout, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, A) each: first token (int32), tokens (int32) and share of its block (float32) of every piece of ``size`` tokens.

    Blocks that are shorter than the longest have fewer: the pieces that they lack are single tokens that weigh nothing.
    """
    rows = layout.block_rows[:, None]
    before = torch.arange(-(-int(rows.max()) // size)) * size
    first = layout.block_start[:, None] + torch.minimum(before, rows - 1)
    count = (rows - before).clamp(0, size)
    with torch.inference_mode(False):
        first, length = first.to(device, torch.int32), count.clamp_min(1).to(device, torch.int32)
        return first, length, (count / rows).to(device)
