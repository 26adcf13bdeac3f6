"""The exchange around an attention call that is split over processes (Ulysses, arXiv 2309.14509):

    before   each rank has some tokens of all heads       (B, S of the rank, H, D)
    within   each rank has all tokens of some heads       (B, S, H of the rank, D)

Ranks may have different numbers of tokens and of heads, so any length and any number of heads at least that of the ranks will do
without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tilewise.plugins.methods.head_part import Heads, some_heads


def to_heads(
    tensors: Sequence[torch.Tensor], heads: Sequence[Sequence[Heads]], sizes: tuple[int, ...], rank: int, group: Any
) -> list[torch.Tensor]:
    """All tokens of this rank's heads, (B, S, h, D) each, in the order of the ranks.

    Args:
        tensors: (B, sizes[rank], H, D) each. heads: of each tensor, the heads of each rank.
        sizes: tokens of each rank. rank, group: this process's number in the group.

    The exchange of one tensor runs while the next is packed.
    """
    waiting = []
    for x, dealt in zip(tensors, heads, strict=True):
        batch, tokens, _, width = x.shape
        row = batch * width
        given, taken = [tokens * len(h) * row for h in dealt], [size * len(dealt[rank]) * row for size in sizes]
        sent, got = x.new_empty(sum(given)), x.new_empty(sum(taken))
        for h, part in zip(dealt, sent.split(given), strict=True):
            part.view(tokens, batch, len(h), width).copy_(some_heads(x, h, 2).transpose(0, 1))
        work = dist.all_to_all_single(got, sent, taken, given, group=group, async_op=True)
        waiting.append((work, got.view(-1, batch, len(dealt[rank]), width), sent))
    for work, _, _ in waiting:
        work.wait()
    return [got.transpose(0, 1) for _, got, _ in waiting]


def to_tokens(out: torch.Tensor, heads: Sequence[Heads], sizes: tuple[int, ...], rank: int, group: Any) -> torch.Tensor:
    """The way back: out (B, S, h, D), in the order of the ranks → (B, sizes[rank], H, D)."""
    batch, _, own, width = out.shape
    tokens, row = sizes[rank], batch * width
    sent = out.transpose(0, 1).contiguous()
    given, taken = [size * own * row for size in sizes], [tokens * len(h) * row for h in heads]
    got = out.new_empty(sum(taken))
    dist.all_to_all_single(got, sent.view(-1), taken, given, group=group)
    parts = [part.view(tokens, batch, -1, width) for part in got.split(taken)]
    whole = torch.cat(parts, 2).transpose(0, 1)
    return in_order(whole, heads, 2).contiguous()


def in_order(x: torch.Tensor, heads: Sequence[Heads], dim: int) -> torch.Tensor:
    """A tensor whose axis ``dim`` has the heads of the first rank, of the second, and so on, with all of them in their order."""
    dealt = tuple(head for h in heads for head in h)
    if dealt == tuple(range(len(dealt))):
        return x
    return some_heads(x, tuple(sorted(range(len(dealt)), key=lambda place: dealt[place])), dim)


def gather(x: torch.Tensor, dim: int, sizes: tuple[int, ...], rank: int, group: Any) -> torch.Tensor:
    """A tensor of whose axis ``dim`` each rank has a part, as long as ``sizes`` says, with the parts of all ranks."""
    own = x.to(torch.uint8) if x.dtype == torch.bool else x
    own = own.movedim(dim, 0)
    room = own.new_zeros((max(sizes), *own.shape[1:]))
    room[: sizes[rank]] = own
    found = [torch.empty_like(room) for _ in sizes]
    dist.all_gather(found, room, group=group)
    whole = torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)]).movedim(0, dim).contiguous()
    return whole.bool() if x.dtype == torch.bool else whole


def gather_size(size: int, device: torch.device, ranks: int, group: Any) -> tuple[int, ...]:
    """What each rank gives as ``size``. Waits for the device."""
    found = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(found, torch.tensor([size], device=device), group=group)
    return tuple(int(n) for n in torch.cat(found).tolist())
