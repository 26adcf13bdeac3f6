"""Which tokens of a sequence each rank has, where a denoiser's sequence is split over processes.

diffusers' hooks split what enters the blocks, each tensor by itself. Text and picture of a joint attention are two tensors, so
the ranks' tokens, one rank after the other, are not the model's sequence:

    the model's     [ text 0 … n | picture 0 … m ]
    of the ranks    [ text 0 | picture 0 ][ text 1 | picture 1 ] …

``segments`` are the lengths of those tensors in the model's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from tilewise.kernels.plans.layout import Grid


class RankOrder(NamedTuple):
    """order, inverse: (S,) int64, where the token of each position of the model's sequence stands among the ranks' tokens, and
    the way back. parts: of each tensor that was split, the tokens of each rank: what the two follow from."""

    order: torch.Tensor
    inverse: torch.Tensor
    parts: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device) -> RankOrder:
        return RankOrder(self.order.to(device), self.inverse.to(device), self.parts)


@dataclass(frozen=True)
class TokenShares:
    """sizes: tokens of each rank. order: None: the ranks' tokens, one rank after the other, are the model's sequence."""

    sizes: tuple[int, ...]
    order: RankOrder | None = None

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


def segments_of(grid: Grid, one_tensor: bool = False) -> tuple[int, ...]:
    """Lengths of the tensors that a model splits, in the order of its sequence: what stands with the text, and the rest, which
    the tokens on the text's other side (reference images, a history) came with. one_tensor: see ``Family``."""
    if one_tensor:
        return (grid.tokens,)
    text = grid.text - grid.opposite
    rest = grid.video + grid.opposite
    if not text:
        return (rest,)
    return (text, rest) if grid.text_first else (rest, text)


def split(length: int, ranks: int) -> tuple[int, ...]:
    """How ``torch.tensor_split`` and, where it divides, ``chunk`` cut a length."""
    return tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))


def tokens_of(length: int, ranks: int, rank: int) -> range:
    """The part of a rank."""
    sizes = split(length, ranks)
    return range(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def shares_of(segments: tuple[int, ...], grid: Grid, sizes: tuple[int, ...]) -> TokenShares | str:
    """How a call's tokens lie on the ranks, of which each has ``sizes``; or why that cannot be told.

    The call is over all segments, over that of the picture alone, or over the picture and a part of each rank's text.
    """
    ranks = len(sizes)
    if len(segments) == 1 and sizes == split(segments[0], ranks):
        return TokenShares(sizes)
    picture = split(grid.video + grid.opposite, ranks)
    text = tuple(size - part for size, part in zip(sizes, picture, strict=True))
    most = split(grid.text - grid.opposite, ranks)
    if len(segments) == 1 or not all(0 <= n <= whole for n, whole in zip(text, most, strict=True)):
        return (
            f"the ranks have {', '.join(map(str, sizes))} tokens of a call, which is not how the grid {grid} is split over "
            f"{ranks} ranks"
        )
    if not any(text):
        return TokenShares(sizes)
    return _joint((text, picture) if grid.text_first else (picture, text))


@lru_cache(maxsize=64)
def _joint(parts: tuple[tuple[int, ...], ...]) -> TokenShares:
    """parts: of each segment, the tokens of each rank."""
    sizes = tuple(map(sum, zip(*parts, strict=True)))
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    pieces = []
    for part in parts:
        for rank, size in enumerate(part):
            pieces.append(torch.arange(starts[rank], starts[rank] + size))
            starts[rank] += size
    order = torch.cat(pieces)
    return TokenShares(sizes, RankOrder(order, order.argsort(), parts))
