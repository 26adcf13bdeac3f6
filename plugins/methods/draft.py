"""``draft``: the model's own low-resolution map decides which key blocks a query block sees (arXiv 2505.14708).

Queries and keys are averaged over the blocks of the layout; the attention of the averages, corrected for how keys differ within
a block (block_logits.py), says what each block would look at. It is made per head, sample and step, and costs 1/128² of
attention, or 1/512 where queries are drafted by themselves, a quarter of them.

Other than in the paper: any grid (border blocks are averaged over the tokens that they have), no query block is ever left
without keys, pairs are ranked by the error that skipping them makes, and what is skipped is not dropped: one summary row a
block stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.selection.block_scores import block_logits
from tilewise.kernels.selection.block_share import block_share
from tilewise.kernels.selection.block_stats import block_stats
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod, DraftMap
from tilewise.plugins.methods.dynamic.block_logits import mean_products, score_variance


@register
@dataclass(frozen=True)
class Draft(BlockSelectionMethod):
    """Keeps the blocks that a low-resolution attention map expects most of.

    The other options are ``BlockSelectionMethod``'s.

    Args:
        variance: correct the map for the variance of keys within a block. False: means alone, as in the paper.
        each: draft queries by themselves, and average their attention (block_share.py): the mean query of a block is more
            certain of where to look than its tokens are, and its recall too good. Default: for a ``recall``, where it reaches
            the same with fewer blocks; not for a ``density``, where only the ranking counts, and hardly changes.

    Raises:
        ConfigError: for values that cannot be.
    """

    variance: bool = True
    each: bool | None = None

    name: ClassVar[str] = "draft"
    source: ClassVar[str] = "DraftAttention, arXiv 2505.14708, with corrections of this project"
    use: ClassVar[str] = "most clips: each head, sample and step chooses what it needs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.variance, bool):
            raise ConfigError(f"draft: variance must be true or false, got {self.variance!r}")
        if self.each not in (None, True, False):
            raise ConfigError(f"draft: each must be true or false, got {self.each!r}")

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        start, rows, _ = layout.block_table(query.device)
        key_start, key_rows, _ = (key_layout or layout).block_table(query.device)
        wanted = self.variance or self.compensates or self.ranks_by_error
        keys = block_stats(key, key_start, key_rows, variance=wanted)
        mean = block_stats(query, start, rows).mean
        if self.each or (self.each is None and self.recall is not None):
            variance = keys.variance if self.variance else None
            share = block_share(query, keys.mean, variance, start, rows, scale, key_rows=key_rows)
            # What is not finite in a query that was not drafted is in its block's mean.
            finite = 0 * mean.sum(-1).transpose(1, 2)[..., None]
            s2 = None if keys.variance is None else score_variance(mean, keys.variance, scale)
            logits = share.clamp_min(torch.finfo(torch.float32).tiny).log() + finite
            return DraftMap(logits, None if s2 is None else keys, s2)
        products = mean_products(mean, keys.mean)
        s2 = None if keys.variance is None else score_variance(mean, keys.variance, scale)
        logits = block_logits(products, s2 if self.variance else None, key_rows, scale)
        return DraftMap(logits, None if s2 is None else keys, s2)
