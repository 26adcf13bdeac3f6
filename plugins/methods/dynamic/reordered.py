"""Methods that bring the tokens of each head into an order of its own before they choose: like ones into the same blocks.

    order of head h    text stays where it is; the video's tokens by their label in h, equal ones in the layout's order
    plan               over the blocks of the layout, filled in that order; queries and keys may have different ones
    output             back in the layout's order

A kernel's blocks are the same rows for all heads, so queries, keys and values are gathered, 4 passes over memory, and clusters of
any size are cut into blocks at the layout's borders.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Around, Planned
from tilewise.plugins.methods.dynamic.map_method import Candidates, MapMethod

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Labels = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class HeadOrders(Around):
    """query: (B, H, S) int64, key: (B, Hk, S) int64: for each head the layout position of the token at each place of the plan."""

    query: torch.Tensor
    key: torch.Tensor
    moves_tokens: bool = True

    def before(self, qkv: QKV) -> QKV:
        query, key, value = qkv
        of_query, of_key = (order.transpose(1, 2)[..., None] for order in (self.query, self.key))
        return (
            query.gather(1, of_query.expand_as(query)),
            key.gather(1, of_key.expand_as(key)),
            value.gather(1, of_key.expand_as(value)),
        )

    def after(self, qkv: QKV, out: torch.Tensor, scale: float | None) -> torch.Tensor:
        back = torch.empty_like(out)
        return back.scatter_(1, self.query.transpose(1, 2)[..., None].expand_as(out), out)


@dataclass(frozen=True, kw_only=True)
class ReorderedMethod(MapMethod):
    """What such methods share. Places mean nothing in their orders, so ``always`` is empty and there is no ``within``.

    Raises:
        ConfigError: for either of them.
    """

    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.always or self.within is not None:
            raise ConfigError(
                f"{self.name}: its blocks are no places of the video, so it takes neither always nor within, got "
                f"always={self.always} and within={self.within}"
            )

    def labels(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, memory: dict[str, Any]) -> Labels:
        """((B, H, V), (B, Hk, V)) int64: what the video's queries and keys are ordered by.

        query: (B, V, H, D); key: (B, V, Hk, D), the video's tokens in the layout's order. memory: kept for the next step where
        ``keeps_memory``.
        """
        raise NotImplementedError

    def refuses_window(self) -> str | None:
        return "its order is one of a whole clip, and not of a KV cache"

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        choice = memory.setdefault("choice", {})
        known: tuple[HeadOrders, Labels] | None = memory.get("orders")
        if known is None or tick - memory["tick"] >= self.refresh:
            choice.clear()  # of blocks in the order that was
            known = self._order(layout, query, key, memory)
            if self.refresh > 1:
                memory.update(orders=known, tick=tick)
        orders, labels = known
        q, k, v = orders.before((query, key, value))
        maps = self.maps_of(layout, q, k, v, scale)
        planned = self.planned(maps, (q, k), scale, lambda c: self.choose_by(c, labels), choice, tick)
        return dataclasses.replace(planned, around=orders)

    def choose_by(self, candidates: Candidates, labels: Labels) -> torch.Tensor:
        """``choose``, for a method whose rule goes by labels too: (B, H, V) and (B, Hk, V), in the order of the plan."""
        return self.choose(candidates)

    def _order(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, memory: dict[str, Any]
    ) -> tuple[HeadOrders, Labels]:
        """The orders of a call's tokens, and the labels in those orders."""
        first = layout.grid.text if layout.grid.text_first else 0
        there = slice(first, first + layout.grid.video)
        of_query, of_key = self.labels(layout, query[:, there], key[:, there], memory)
        (of_query, query_order), (of_key, key_order) = (x.sort(dim=-1, stable=True) for x in (of_query, of_key))
        return HeadOrders(_beside_text(query_order, layout), _beside_text(key_order, layout)), (of_query, of_key)


def _beside_text(order: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(B, H, S): an order (B, H, V) of the video's tokens, with the text where the layout has it."""
    grid = layout.grid
    first = grid.text if grid.text_first else 0
    text = torch.arange(grid.tokens, device=order.device).expand(*order.shape[:2], -1)
    return torch.cat([text[..., :first], order + first, text[..., first + grid.video :]], -1)


def band(layout: Layout, device: torch.device) -> torch.Tensor:
    """(N, N) float32, kept with the layout: minus the distance of two blocks in the order, in blocks."""

    def make() -> torch.Tensor:
        number = torch.arange(layout.blocks, dtype=torch.float32)
        with torch.inference_mode(False):
            return -(number[:, None] - number[None, :]).abs().to(device)

    return layout.cached(("band", device), make)
