"""``neighborhood``: (generalized) neighborhood attention (arXiv 2204.07143, 2209.15001, 2504.16922), exact to the token.

Each query sees a window of tokens around it, which shifts inward at borders and keeps its size. stride: queries of a run share
the window of the one in its middle, which makes fewer blocks partial. dilation: every d-th token of an axis, so that the window
reaches d times as far. causal: over time, only the present and the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.dilated import axes_plan, axis_windows, dilated_layout
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.kernels.plans.tiling import choose_tile_for_window
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Method, register
from tilewise.plugins.methods.inward import MAX_BLOCKS

Triple = tuple[int, int, int]


@register
@dataclass(frozen=True)
class Neighborhood(Method):
    """Neighborhood attention.

    Args:
        window: tokens (t, h, w), each ≥ 1; larger than the axis (or than its residue class) means all of it.
        stride: tokens (t, h, w) that share a window; 1 is plain neighborhood attention.
        dilation: (t, h, w), each ≥ 1.
        causal: whether a query sees no later frame. The window over t then ends at the query.

    Raises:
        ConfigError: for values below 1, a causal window over t shorter than its stride; on a grid with text tokens in the same
            sequence, for a dilation.
    """

    window: Triple = (9, 15, 15)
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal: bool = False

    name: ClassVar[str] = "neighborhood"

    def __post_init__(self) -> None:
        for what in ("window", "stride", "dilation"):
            value = getattr(self, what)
            good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
            if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
                raise ConfigError(
                    f"neighborhood: {what} must be three whole numbers of at least 1, (t, h, w) in tokens, got {value!r}"
                )
            object.__setattr__(self, what, tuple(value))
        if not isinstance(self.causal, bool):
            raise ConfigError(f"neighborhood: causal must be true or false, got {self.causal!r}")
        if self.causal and self.stride[0] > self.window[0]:
            raise ConfigError(
                f"neighborhood: a causal window of {self.window[0]} frames cannot have a stride of {self.stride[0]}; some "
                "queries would see nothing. Give a stride of at most the window"
            )

    def layout(self, grid: Grid) -> Layout:
        if self.dilation == (1, 1, 1):
            return cached_layout(grid, choose_tile_for_window(grid, self.window, self.stride))
        if grid.text:
            raise ConfigError(
                f"neighborhood: the grid {grid} has text tokens in the same sequence, which dilation {self.dilation} does not "
                "know how to order; use dilation (1, 1, 1)"
            )
        # Tiles for one residue class: pairs of different classes never see each other.
        t, h, w = (-(-n // d) for n, d in zip(grid.shape, self.dilation, strict=True))
        return dilated_layout(grid, choose_tile_for_window(Grid(t, h, w), self.window, self.stride), self.dilation)

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        if layout.blocks > MAX_BLOCKS:
            raise ConfigError(
                f"neighborhood: the grid {layout.grid} has {layout.blocks} blocks, more than {MAX_BLOCKS}: the size is too large"
            )
        sizes = zip(layout.grid.shape, self.window, self.stride, self.dilation, strict=True)
        axes = []
        for axis, (length, window, stride, dilation) in enumerate(sizes):
            causal = self.causal and axis == 0
            # A stride longer than a (short) causal axis would be refused there: one group is all that is left of it.
            stride = min(stride, length) if causal else stride
            axes.append(axis_windows(length, window, stride, dilation, causal))
        return axes_plan(layout, axes, device)

    def describe(self, layout: Layout) -> dict[str, Any]:
        return {"window (tokens)": self.window, "stride": self.stride, "dilation": self.dilation, "causal": self.causal}
