"""What ``summary`` and ``explain`` say of a denoiser under context parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.context_parallel.halves import halves_of
from tilewise.plugins.context_parallel.head_dealing import HeadDealer, deal
from tilewise.plugins.context_parallel.token_shares import split
from tilewise.plugins.diffusers_compat import context_parallel
from tilewise.plugins.methods.base import DynamicMethod, Method
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.text_format import counted, ranges


@dataclass(frozen=True)
class RankRow:
    """This process's part of a denoiser's work.

    rank, ranks: among those that split the sequence; where none do, its half under CFG parallelism, of 2.
    heads: those of a layer that it computes, as in "0-5 of 12", or how many; "" where it computes all.
    exchanges: with the other ranks. seconds: spent in them, waiting for the others included.
    branch: of guidance, which part its half computes under CFG parallelism; "" without.
    balance: token pairs that the busiest rank keeps in a call ÷ the mean over ranks, in the mean over calls at sparse steps; None
        where each has all heads, and where it is not known yet. by_figures: whether heads change places by what they kept in the
        forward before.
    """

    denoiser: str
    rank: int
    ranks: int
    heads: str
    exchanges: int
    seconds: float
    branch: str = ""
    balance: float | None = None
    by_figures: bool = False

    @property
    def part(self) -> str:
        """Heads and branch in a few words."""
        return ", ".join(filter(None, (self.heads and f"heads {self.heads}", self.branch)))

    def __str__(self) -> str:
        even = "" if self.balance is None else f" Work of the busiest rank ÷ mean: {self.balance:.3f}"
        if self.by_figures:
            even += ", heads dealt by what they kept in the forward before"
        exchanges = f"{counted(self.exchanges, 'exchange')} with the other ranks in {self.seconds:.2f} s"
        return (
            f"{'context' if self.heads else 'CFG'} parallelism, {self.denoiser}: rank {self.rank} of {self.ranks}, {self.part}; "
            f"{exchanges}. The table is of this part.{even}"
        )


def rank_row(
    name: str,
    denoiser: Any,
    layers: Sequence[AttentionLayer],
    method: Method,
    dealer: HeadDealer,
    exchanges: int,
    seconds: float,
) -> RankRow | None:
    """The row of a denoiser; None where nothing of it is divided, or its sequence not by heads."""
    at, halves = context_parallel(denoiser), halves_of(denoiser)
    branch = "" if halves is None else halves.part
    if at is None and halves is not None:
        return RankRow(name, halves.half, 2, "", exchanges, seconds, branch)
    if at is None or at.ring > 1:
        return None
    heads = max(layer.heads for layer in layers)
    own = deal(heads, at.ulysses)[at.rank]
    which = (
        str(len(own)) if dealer.by_figures or method.head_costs() else ranges(list(own))
    )  # else by layer and noise level
    return RankRow(
        name, at.rank, at.ulysses, f"{which} of {heads}", exchanges, seconds, branch,
        dealer.balance, dealer.by_figures,
    )  # fmt: skip


@dataclass(frozen=True)
class RankPlan:
    """What each rank would have of a denoiser, by rank: heads of a layer, tokens between attention calls, and the density of its
    heads (nan where only a call decides). branches: of guidance, 2 where each is computed by so many GPUs; else 1."""

    denoiser: str
    heads: tuple[int, ...]
    tokens: tuple[int, ...]
    density: tuple[float, ...]
    branches: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a density that only a call decides is None."""
        density = [None if math.isnan(value) else value for value in self.density]
        heads, tokens = list(self.heads), list(self.tokens)
        return {
            "denoiser": self.denoiser, "heads": heads, "tokens": tokens, "density": density, "branches": self.branches,
            "balance": self.balance,
        }  # fmt: skip

    @property
    def balance(self) -> float:
        """Work of the busiest rank ÷ the mean, by its heads' density; by their number where only a call decides."""
        known = not any(map(math.isnan, self.density))
        work = [n * (density if known else 1.0) for n, density in zip(self.heads, self.density, strict=True)]
        return max(work) * len(work) / sum(work)

    def __str__(self) -> str:
        density = [f"{value:.3f}" for value in (min(self.density), max(self.density))]
        kept = "decided at each call" if "nan" in density else " to ".join(dict.fromkeys(density))
        branch = "one branch of guidance, " if self.branches > 1 else ""
        gpus, heads = len(self.heads) * self.branches, f"{_range(self.heads)} of {sum(self.heads)} heads"
        return (
            f"{self.denoiser} on {gpus} GPUs, a GPU: {branch}{heads}, "
            f"{_range(self.tokens)} of {sum(self.tokens):,} tokens, density {kept}; work of the busiest ÷ mean {self.balance:.2f}"
        )


def rank_plan(
    name: str,
    heads: int,
    method: Method,
    layout: Layout | None,
    ranks: int,
    segments: Sequence[int],
    branches: int = 1,
) -> RankPlan:
    """heads: of a layer. segments: see ``segments_of``. layout: the method's; None: it is dense. ranks: that split the tokens."""
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
    tokens = tuple(map(sum, zip(*pieces, strict=True)))
    return RankPlan(name, tuple(map(len, dealt)), tokens, tuple(density), branches)


def _range(values: Sequence[int]) -> str:
    return " to ".join(f"{value:,}" for value in dict.fromkeys((min(values), max(values))))
