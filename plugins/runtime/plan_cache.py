"""What a patched denoiser makes once and keeps from one forward to the next: token orders and plans, on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.block_plan import BlockPlan, dense_plan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.context_parallel.token_shares import RankOrder
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.methods.base import Method, of_heads

Order = tuple[torch.Tensor, torch.Tensor]
MAX_PLANS = 64
MAX_DENSE_PLANS = 8  # up to 32 MiB each
T = TypeVar("T")


class LRU:
    """At most ``most`` entries by key; the one that was used longest ago is forgotten. Threads may share it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Any]:
        """The keys; the one that was used longest ago comes first."""
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def used(self, key: Hashable) -> Any:
        """The entry of ``key``, which counts as used now; None if there is none."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def lookup(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry of ``key``, made by ``make`` if there is none."""
        found = self.used(key)
        if found is not None:
            return found
        value = make()  # without the lock: another thread may make it too, and the first to come is kept
        with self._lock:
            value = self._entries.setdefault(key, value)
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)
        return value


class PlanCache:
    """The orders and plans of one denoiser. name: the denoiser's, for messages; method: of the patch."""

    def __init__(self, name: str, method: Method) -> None:
        self.name = name
        self.method = method
        self.orders = LRU(MAX_PLANS)
        self.plans = LRU(MAX_PLANS)
        self.rank_sizes = LRU(MAX_PLANS)  # of calls whose tokens are split over ranks: how many each has
        self._rank_orders = LRU(MAX_PLANS)
        self._dense_plans = LRU(MAX_DENSE_PLANS)

    def order(self, layout: Layout, device: torch.device) -> Order:
        """(permutation, inverse) of a layout, (S,) int64."""

        def make() -> Order:
            self._not_while_capturing(device, f"the token order of the grid {layout.grid}")
            return layout.permutation.to(device), layout.inverse.to(device)

        return self.orders.lookup((layout, device), make)

    def rank_order(self, order: RankOrder, device: torch.device) -> RankOrder:
        """The same on a device."""
        return self._rank_orders.lookup((order.parts, device), lambda: order.to(device))

    def order_from(self, rank_order: RankOrder | None, layout: Layout, device: torch.device) -> Order:
        """``order`` of tokens that stand in the order of ranks; None: in the model's own."""
        if rank_order is None:
            return self.order(layout, device)

        def make() -> Order:
            there = rank_order.order[self.order(layout, device)[0]]
            return there, there.argsort()

        return self.orders.lookup((layout, device, rank_order.parts), make)

    def plan(
        self, layout: Layout, heads: int, device: torch.device, part: range | tuple[int, ...] | None = None
    ) -> BlockPlan:
        """The method's plan, made once for a layout, number of heads and device. part: which of a layer's heads, if some."""

        def make() -> BlockPlan:
            self._not_while_capturing(device, f"the plan of the grid {layout.grid}")
            return of_heads(self.method, part).plan(layout, heads, device)

        return self.plans.lookup((layout, heads, device, part), make)

    def dense_plan(self, tokens: int, device: torch.device, keys: int | None = None) -> BlockPlan:
        """The plan of dense attention over so many tokens, in whatever order they are; keys: how many of them, if not as many."""
        keys = tokens if keys is None else keys

        def make() -> BlockPlan:
            self._not_while_capturing(device, f"the plan of {tokens} tokens over {keys}")
            queries, seen = (Layout(Grid(1, 1, n), (1, 1, n)) for n in (tokens, keys))
            return dense_plan(queries, device, key_layout=None if keys == tokens else seen)

        return self._dense_plans.lookup((tokens, keys, device), make)

    def _not_while_capturing(self, device: torch.device, what: str) -> None:
        if capturing(device):
            raise TilewiseError(
                f"{self.name}: {what} cannot be made while a CUDA graph is being captured; run the denoiser once at this size "
                "first"
            )
