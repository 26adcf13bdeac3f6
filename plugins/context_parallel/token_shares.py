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

import torch

from tilewise.kernels.plans.layout import Grid


@dataclass(frozen=True)
class TokenShares:
    """sizes: tokens of each rank. order, inverse: (S,) int64 on the CPU, where the token of each position of the model's sequence
    stands among the ranks' tokens, and the way back; None: in the same place."""

    sizes: tuple[int, ...]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


def segments_of(grid: Grid) -> tuple[int, ...]:
    """Lengths of the tensors that a model splits, in the order of its sequence: what stands with the text, and the rest, which
    the tokens on the text's other side (reference images, a history) came with."""
    text = grid.text - grid.opposite
    rest = grid.video + grid.opposite
    if not text:
        return (rest,)
    return (text, rest) if grid.text_first else (rest, text)


def split(length: int, ranks: int) -> tuple[int, ...]:
    """How ``torch.tensor_split`` and, where it divides, ``chunk`` cut a length."""
    return tuple(length // ranks + (rank < length % ranks) for rank in range(ranks))


def shares_of(segments: tuple[int, ...], grid: Grid, sizes: tuple[int, ...]) -> TokenShares | str:
    """How a call's tokens lie on the ranks, of which each has ``sizes``; or why that cannot be told.

    The call is over all segments, or over that of the picture alone.
    """
    picture = (grid.video + grid.opposite,)
    for candidate in dict.fromkeys((segments, picture)):
        cut = [split(length, len(sizes)) for length in candidate]
        if tuple(map(sum, zip(*cut, strict=True))) == sizes:
            return _shares(candidate, sizes)
    return (
        f"the ranks have {', '.join(map(str, sizes))} tokens of a call, which is not how the grid {grid} is split over "
        f"{len(sizes)} ranks"
    )


@lru_cache(maxsize=64)
def _shares(segments: tuple[int, ...], sizes: tuple[int, ...]) -> TokenShares:
    if len(segments) == 1:
        return TokenShares(sizes)
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    pieces = []
    for length in segments:
        for rank, size in enumerate(split(length, len(sizes))):
            pieces.append(torch.arange(starts[rank], starts[rank] + size))
            starts[rank] += size
    order = torch.cat(pieces)
    return TokenShares(sizes, order, order.argsort())
