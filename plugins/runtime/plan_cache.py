"""What a patched denoiser makes once and keeps from one forward to the next: token orders and plans, on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Layout, cached_layout
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.methods.base import Method
from tilewise.plugins.runtime import dense_backend

Order = tuple[torch.Tensor, torch.Tensor]
MAX_PLANS = 64
MAX_EXACT_PLANS = 8  # up to 32 MiB each


class Kept:
    """The orders and plans of one denoiser. name: the denoiser's, for messages; method: of the patch."""

    def __init__(self, name: str, method: Method) -> None:
        self.name = name
        self.method = method
        self.orders: dict[tuple[Layout | int, torch.device], Order] = {}
        self.plans: dict[tuple[Layout, int, torch.device], BlockPlan] = {}
        self._exact: dict[tuple[int, torch.device], BlockPlan] = {}

    def order(self, layout: Layout, device: torch.device) -> Order:
        """(permutation, inverse) of a layout, (S,) int64."""
        key = (layout, device)
        if key not in self.orders:
            self._not_while_capturing(device, layout)
            _make_room(self.orders, MAX_PLANS)
            self.orders[key] = layout.permutation.to(device), layout.inverse.to(device)
        return self.orders[key]

    def video_order(self, layout: Layout, device: torch.device) -> Order:
        """``order`` for the video tokens alone, counted from 0."""
        alone = cached_layout(dataclasses.replace(layout.grid, text=0), layout.tile, layout.max_block_rows)
        return self.order(alone, device)

    def identity(self, tokens: int, device: torch.device) -> Order:
        """The order of tokens that stay where they are."""
        key = (tokens, device)
        if key not in self.orders:
            self.orders[key] = (torch.arange(tokens, device=device),) * 2
        return self.orders[key]

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        """The method's plan, made once for a layout, number of heads and device."""
        key = (layout, heads, device)
        if key not in self.plans:
            self._not_while_capturing(device, layout)
            _make_room(self.plans, MAX_PLANS)
            self.plans[key] = self.method.plan(layout, heads, device)
        return self.plans[key]

    def exact_plan(self, tokens: int, device: torch.device) -> BlockPlan:
        """The plan of dense attention over so many tokens."""
        key = (tokens, device)
        if key not in self._exact:
            if capturing(device):
                raise TilewiseError(
                    f"{self.name}: the plan of {tokens} tokens cannot be made while a CUDA graph is being captured; run the "
                    "denoiser once at this size first"
                )
            _make_room(self._exact, MAX_EXACT_PLANS)
            self._exact[key] = dense_backend.exact_plan(tokens, device)
        return self._exact[key]

    def _not_while_capturing(self, device: torch.device, layout: Layout) -> None:
        if capturing(device):
            raise TilewiseError(
                f"{self.name}: the plan and token order of the grid {layout.grid} cannot be made while a CUDA graph is being "
                "captured; run the denoiser once at this size first"
            )


def _make_room(kept: dict[Any, Any], most: int) -> None:
    """Forget the oldest entries: prompts of ever new lengths bring ever new plans and orders."""
    while len(kept) >= most:
        del kept[next(iter(kept))]
