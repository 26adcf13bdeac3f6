"""Which heads of a layer each rank computes, where a denoiser's calls are split by heads.

Where heads differ in work, the ranks wait at each exchange for the one that has most. Some methods know the work of their heads
beforehand (``Method.head_costs``). With others a call decides: there the next forward's heads are dealt by what those of the last
one kept, which all ranks tell each other once a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from tilewise.kernels.device import capturing
from tilewise.plugins.diffusers_compat import ContextParallel
from tilewise.plugins.methods.head_part import Heads

PAYS = 1.03  # how many times as much the busiest rank must have before heads change places: moving them costs two more copies


@lru_cache(maxsize=1024)
def deal(heads: int, ranks: int, costs: tuple[float, ...] | None = None) -> tuple[Heads, ...]:
    """The heads of each rank: as many each, or one more for some.

    costs: the work of each head, where they differ: the dearest first, each to the rank with the least work so far that has room
    (Graham 1969). None: the first heads to the first rank, and so on.
    """
    each, more = divmod(heads, ranks)
    if costs is None or len(set(costs)) == 1:
        starts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
        return tuple(map(range, starts, starts[1:]))
    own: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for head in sorted(range(heads), key=lambda head: -costs[head]):
        full = sum(len(dealt) > each for dealt in own) == more  # nobody else gets one more
        room = [rank for rank in range(ranks) if len(own[rank]) < each + (not full)]
        rank = min(room, key=lambda rank: load[rank])
        own[rank].append(head)
        load[rank] += costs[head]
    return tuple(tuple(sorted(dealt)) for dealt in own)


def balance(dealt: Sequence[Heads], costs: Sequence[float] | None = None) -> float:
    """Work of the rank that has most ÷ the mean over ranks. costs: of each head; None: all cost the same."""
    work = [sum(1.0 if costs is None else costs[head] for head in heads) for heads in dealt]
    total = sum(work)
    return max(work) * len(work) / total if total else 1.0


class HeadDealer:
    """Deals the heads of one denoiser's layers.

    balance: Σ of the calls' balance, and of how many calls it is known: see ``summary``.
    """

    def __init__(self) -> None:
        self.calls, self.sum = 0, 0.0
        self._dealt: dict[int, tuple[Heads, ...]] = {}  # by layer: how its calls are dealt that go by the last ones
        self._told: dict[
            int, tuple[tuple[Heads, ...], torch.Tensor]
        ] = {}  # by layer, of the forward under way or just over
        self._over = False

    @property
    def balance(self) -> float | None:
        """Work of the busiest rank ÷ the mean, in the mean over calls; None: no call of which it is known."""
        return self.sum / self.calls if self.calls else None

    @property
    def by_figures(self) -> bool:
        """Whether a layer's heads change places by what they kept."""
        return any(not isinstance(heads, range) for dealt in self._dealt.values() for heads in dealt)

    def restart(self) -> None:
        """Count anew. What heads kept stays known."""
        self.calls, self.sum = 0, 0.0

    def begin(self) -> None:
        """A forward begins."""
        self._over = True

    def known(self, heads: int, ranks: int, costs: tuple[float, ...] | None) -> tuple[Heads, ...]:
        """The heads of each rank in a call whose heads differ as ``costs`` says; None: not at all."""
        dealt = deal(heads, ranks, costs)
        self._count(balance(dealt, costs))
        return dealt

    def by_last(self, number: int, heads: int, at: ContextParallel, device: torch.device) -> tuple[Heads, ...]:
        """The heads of each rank in a call of layer ``number`` that decides by itself what each keeps. The first one in a forward
        waits for the device, and for the other ranks."""
        if self._over and not capturing(device):
            self._exchange(at)
        found = self._dealt.get(number)
        return found if found is not None and sum(map(len, found)) == heads else deal(heads, at.ulysses)

    def tell(self, number: int, dealt: tuple[Heads, ...], rank: int, density: torch.Tensor | None) -> None:
        """What this rank's heads of layer ``number`` kept, (h,) on the device; None: not known. All ranks tell of one call."""
        own = len(dealt[rank])
        if density is None or density.shape != (own,):
            density = torch.full((own,), torch.nan)
        elif capturing(density.device):
            return
        self._told[number] = dealt, density

    def _count(self, value: float) -> None:
        self.calls += 1
        self.sum += value

    def _exchange(self, at: ContextParallel) -> None:
        """Deal anew by what all ranks told of the last forward, where that pays."""
        self._over = False
        told, self._told = self._told, {}
        if not told:
            return
        for (number, (dealt, _)), costs in zip(told.items(), _of_all_ranks(told, at), strict=True):
            if any(cost != cost for cost in costs):  # not known
                continue
            before = balance(dealt, costs)
            self._count(before)
            better = deal(len(costs), at.ulysses, costs)
            if before > PAYS * balance(better, costs):
                self._dealt[number] = better


def _of_all_ranks(
    told: dict[int, tuple[tuple[Heads, ...], torch.Tensor]], at: ContextParallel
) -> list[tuple[float, ...]]:
    """What all heads of each layer kept, from what each rank knows of its own."""
    most = max(len(heads) for dealt, _ in told.values() for heads in dealt)
    device = next((own.device for _, own in told.values() if own.device.type != "cpu"), torch.device("cpu"))
    table = torch.full((len(told), most), torch.nan, device=device)
    for row, (_, own) in zip(table, told.values(), strict=True):
        row[: len(own)] = own
    found = [torch.empty_like(table) for _ in range(at.ulysses)]
    dist.all_gather(found, table, group=at.group)
    each: Any = torch.stack(found).tolist()  # by rank, layer and place
    costs = []
    for row_number, (dealt, _) in enumerate(told.values()):
        of_head = {
            head: each[rank][row_number][place] for rank, heads in enumerate(dealt) for place, head in enumerate(heads)
        }
        costs.append(tuple(of_head[head] for head in range(len(of_head))))
    return costs
