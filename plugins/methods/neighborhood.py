"""``neighborhood``: (generalized) neighborhood attention (arXiv 2204.07143, 2209.15001, 2504.16922), exact to the token.

Each query sees a window of tokens around it, which shifts inward at borders and keeps its size. stride: queries of a run share
the window of the one in its middle, which makes fewer blocks partial. dilation: every d-th token of an axis, so that the window
reaches d times as far. causal: on an axis, nothing behind the query; over time, only the present and the past.
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
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.inward import MAX_BLOCKS
from tilewise.plugins.methods.windows import WindowMethod

Triple = tuple[int, int, int]
AXES = ("t", "h", "w")


@register
@dataclass(frozen=True)
class Neighborhood(WindowMethod):
    """Windows of tokens around each query, exact, with strides, dilation and causal axes.

    Args:
        window: tokens (t, h, w), each ≥ 1; larger than the axis (or than its residue class) means all of it.
        stride: tokens (t, h, w) that share a window; 1 is plain neighborhood attention.
        dilation: (t, h, w), each ≥ 1.
        causal: (t, h, w), whether a query sees nothing behind itself on an axis, whose window then ends at the query. True: on
            t alone, so that it sees no later frame. (NATTEN's ``is_causal=True`` is ``(True, True, True)`` here; its tuples mean
            the same.)
        far, cell: what stands for the keys outside the window: see ``WindowMethod``. Not with a causal axis or a dilation.

    Raises:
        ConfigError: for values below 1, a causal axis with a window shorter than its stride, a far field with a causal axis or a
            dilation; on a grid with text tokens in the same sequence, for a dilation.
    """

    window: Triple = (9, 15, 15)
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal: bool | tuple[bool, bool, bool] = False

    name: ClassVar[str] = "neighborhood"
    source: ClassVar[str] = "generalized neighborhood attention, arXiv 2504.16922"
    use: ClassVar[str] = "windows that are exact to the token, causal or dilated ones too"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("window", "stride", "dilation"):
            value = getattr(self, what)
            good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
            if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
                raise ConfigError(
                    f"neighborhood: {what} must be three whole numbers of at least 1, (t, h, w) in tokens, got {value!r}"
                )
            object.__setattr__(self, what, tuple(value))
        if not isinstance(self.causal, bool):
            given = self.causal
            good = isinstance(given, Sequence) and len(given) == 3 and all(isinstance(on, bool) for on in given)
            if not good:
                raise ConfigError(
                    f"neighborhood: causal must be true or false (true: on t), or three of them for (t, h, w), got {given!r}"
                )
            object.__setattr__(self, "causal", tuple(given))
        for axis, causal, window, stride in zip(AXES, self.causal_axes, self.window, self.stride, strict=True):
            if causal and stride > window:
                raise ConfigError(
                    f"neighborhood: a causal window of {window} on {axis} cannot have a stride of {stride}; some queries would "
                    "see nothing. Give a stride of at most the window"
                )

        if self.far is not None and (any(self.causal_axes) or self.dilation != (1, 1, 1)):
            raise ConfigError(
                f"neighborhood: far={self.far!r} would show what a causal axis or a dilation hides: use it with causal=False "
                f"and dilation (1, 1, 1), got causal={self.causal} and dilation {self.dilation}"
            )

    @property
    def causal_axes(self) -> tuple[bool, bool, bool]:
        """Whether t, h and w are causal."""
        return (self.causal, False, False) if isinstance(self.causal, bool) else self.causal

    def layout(self, grid: Grid) -> Layout:
        if self.dilation == (1, 1, 1):
            return self.with_cells(cached_layout(grid, choose_tile_for_window(grid, self.window, self.stride)))
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
        sizes = zip(layout.grid.shape, self.window, self.stride, self.dilation, self.causal_axes, strict=True)
        axes = []
        for length, window, stride, dilation, causal in sizes:
            # A stride longer than a (short) causal axis would be refused there: one group is all that is left of it.
            stride = min(stride, length) if causal else stride
            axes.append(axis_windows(length, window, stride, dilation, causal))
        return self.with_far(axes_plan(layout, axes, device), layout)

    def describe(self, layout: Layout) -> dict[str, Any]:
        window = {
            "window (tokens)": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "causal": self.causal,
        }
        return {**window, **self.describe_far(layout)}
