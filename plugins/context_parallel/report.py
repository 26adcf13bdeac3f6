"""What ``summary`` and ``explain`` say of a denoiser under context parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.context_parallel.head_exchange import deal
from tilewise.plugins.context_parallel.token_shares import split
from tilewise.plugins.diffusers_compat import context_parallel
from tilewise.plugins.methods.base import DynamicMethod, Method
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.text_format import counted, ranges


@dataclass(frozen=True)
class RankRow:
    """This process's part of a denoiser's attention.

    heads: those of a layer that it computes, as in "0-5 of 12", or how many. exchanges: with the other ranks, two a call.
    seconds: spent in them, waiting for the others included.
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
    name: str, denoiser: Any, layers: Sequence[AttentionLayer], method: Method, exchanges: int, seconds: float
) -> RankRow | None:
    """The row of a denoiser; None where its sequence is not split, or not by heads."""
    at = context_parallel(denoiser)
    if at is None or at.ring > 1:
        return None
    heads = max(layer.heads for layer in layers)
    own = deal(heads, at.ulysses)[at.rank]
    which = ranges(list(own)) if method.head_costs() is None else str(len(own))  # by layer and noise level then
    return RankRow(name, at.rank, at.ulysses, f"{which} of {heads}", exchanges, seconds)


@dataclass(frozen=True)
class RankPlan:
    """What each rank would have of a denoiser, by rank: heads of a layer, tokens between attention calls, and the density of its
    heads (nan where only a call decides)."""

    denoiser: str
    heads: tuple[int, ...]
    tokens: tuple[int, ...]
    density: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a density that only a call decides is None."""
        density = [None if math.isnan(value) else value for value in self.density]
        return {"denoiser": self.denoiser, "heads": list(self.heads), "tokens": list(self.tokens), "density": density}

    def __str__(self) -> str:
        density = [f"{value:.3f}" for value in (min(self.density), max(self.density))]
        kept = "decided at each call" if "nan" in density else " to ".join(dict.fromkeys(density))
        return (
            f"{self.denoiser} on {len(self.heads)} GPUs, a GPU: {_range(self.heads)} of {sum(self.heads)} heads, "
            f"{_range(self.tokens)} of {sum(self.tokens):,} tokens, density {kept}"
        )


def rank_plan(
    name: str, heads: int, method: Method, layout: Layout | None, ranks: int, segments: Sequence[int]
) -> RankPlan:
    """heads: of a layer. segments: see ``segments_of``. layout: the method's; None: it is dense."""
    dealt = deal(heads, ranks, method.head_costs() if layout is not None else None)
    pieces = [split(length, ranks) for length in segments]
    density = [1.0] * ranks
    if layout is not None:
        for rank, own in enumerate(dealt):
            mine = method.of_heads(own)
            if isinstance(mine, DynamicMethod):
                density[rank] = mine.expected_density(layout, len(own))
            else:
                density[rank] = mine.plan(layout, len(own), torch.device("cpu")).density
    return RankPlan(name, tuple(map(len, dealt)), tuple(map(sum, zip(*pieces, strict=True))), tuple(density))


def _range(values: Sequence[int]) -> str:
    return " to ".join(f"{value:,}" for value in dict.fromkeys((min(values), max(values))))
