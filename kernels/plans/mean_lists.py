"""Which blocks of means each query block sees, for a kernel that takes means as further keys, 128 at a time.

A mean has a bias on its scores, bias[i, j] for query block i and mean j; −inf where it stands for nothing. 128 means are a block:

    even      all have one bias, that of a mean whose tokens are all hidden
    uneven    some have another: they are cut by a border, or the query block sees their tokens exactly
    unlisted  all are −inf

A kernel adds an even bias once for all blocks, and an uneven one to every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

MEANS = 128  # of a block


@dataclass(frozen=True, eq=False)
class MeanLists:
    """Attributes:
    index: (G, Nq, L) int32, blocks of means by set of heads and query block: the even ones, then the uneven ones, then others.
        Nq = 1: one list for all query blocks.
    ends: (G, Nq, 2) int32, where the even ones end, and where the uneven ones do.
    even_bias: natural, of the even blocks.
    """

    index: torch.Tensor
    ends: torch.Tensor
    even_bias: float

    @property
    def strides(self) -> tuple[int, int]:
        """Lists from one set to the next, and from one query block to the next."""
        sets, queries = self.ends.shape[:2]
        return queries if sets > 1 else 0, 1 if queries > 1 else 0


def mean_lists(bias: torch.Tensor, even: float) -> MeanLists:
    """The lists for a bias (G, Nq, N) float32. even: what most means have, in float32 exactly."""
    sets, queries, means = bias.shape
    short = -means % MEANS
    blocks = torch.nn.functional.pad(bias, (0, short), value=-torch.inf).view(sets, queries, -1, MEANS)
    kind = torch.where((blocks == even).all(-1), 0, torch.where((blocks == -torch.inf).all(-1), 2, 1))
    index = torch.argsort(kind, dim=-1, stable=True)
    ends = torch.stack([(kind == 0).sum(-1), (kind < 2).sum(-1)], -1)
    return MeanLists(index.int().contiguous(), ends.int().contiguous(), even)


def with_rows_in_line(bias: torch.Tensor) -> torch.Tensor:
    """``bias`` (B, H, Nq, N) with the N means of a query block side by side and its blocks one after another, as kernels read it.
    Samples and heads may share one: strides of 0."""
    in_line = bias.stride(3) == 1 and bias.stride(2) == bias.shape[3]
    return bias if in_line else bias.contiguous()


@lru_cache(maxsize=64)
def every_block(means: int, device: torch.device) -> MeanLists:
    """One list of all blocks, each uneven, for a bias of which nothing is known."""
    blocks = -(-means // MEANS)
    index = torch.arange(blocks, dtype=torch.int32, device=device)[None, None]
    return MeanLists(index, torch.tensor([[[0, blocks]]], dtype=torch.int32, device=device), 0.0)
