"""What ``summary`` says of a denoiser under context parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewise.plugins.context_parallel.head_exchange import deal
from tilewise.plugins.diffusers_compat import context_parallel
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.text_format import counted


@dataclass(frozen=True)
class RankRow:
    """This process's part of a denoiser's attention.

    heads: those of a layer that it computes, as in "0-5 of 12". exchanges: with the other ranks, two a call; seconds: spent in
    them, waiting for the others included.
    """

    denoiser: str
    rank: int
    ranks: int
    heads: str
    exchanges: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"context parallelism, {self.denoiser}: rank {self.rank} of {self.ranks}, heads {self.heads}; "
            f"{counted(self.exchanges, 'exchange')} with the other ranks in {self.seconds:.2f} s. The table is of these heads"
        )


def rank_row(
    name: str, denoiser: Any, layers: Sequence[AttentionLayer], exchanges: int, seconds: float
) -> RankRow | None:
    """The row of a denoiser; None where its sequence is not split, or not by heads."""
    at = context_parallel(denoiser)
    if at is None or at.ring > 1:
        return None
    heads = max(layer.heads for layer in layers)
    own = deal(heads, at.ulysses)[at.rank]
    which = f"{own.start}" if len(own) == 1 else f"{own.start}-{own.stop - 1}"
    return RankRow(name, at.rank, at.ulysses, f"{which} of {heads}", exchanges, seconds)
