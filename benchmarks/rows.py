"""The attention calls that are measured: a grid, heads, and what each query sees of it.

GPU_ROWS   sizes of real models
CPU_ROWS   the bundled demo model's
TINY_ROWS  one of each kind, in seconds on anything: for tests, and to see whether every peer runs on a machine
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.kernels.plans.tiling import choose_tile_for_window
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.methods.sta import STA

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class TokenWindow:
    """A token-exact window of all heads: inward for stride 1 (arXiv 2511.14712), neighborhood attention in general.

    ``tile`` None: the one that makes the kernel compute least.
    """

    window: Triple
    stride: Triple = (1, 1, 1)
    tile: Triple | None = None

    def layout(self, grid: Grid) -> Layout:
        return cached_layout(grid, self.tile or choose_tile_for_window(grid, self.window, self.stride))

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        return window_plan(layout, [self.window], unit="token", stride=self.stride, device=device)


@dataclass(frozen=True)
class Row:
    """One attention call, batch 1. ``flex``: the token orders in which FlexAttention runs it (compiling costs seconds)."""

    name: str
    grid: Grid
    heads: int
    head_dim: int
    method: STA | TokenWindow
    flex: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        return "tile" if isinstance(self.method, STA) else "token"

    @property
    def stride(self) -> Triple:
        return (1, 1, 1) if isinstance(self.method, STA) else self.method.stride

    def windows(self, layout: Layout) -> tuple[Triple, ...]:
        """One window that all heads share, or one a head, in ``unit``."""
        return self.method.windows(layout) if isinstance(self.method, STA) else (self.method.window,)


def interval(i: torch.Tensor, length: int, window: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible coordinates [lo, hi) of queries at ``i`` on one axis: the formula in the head of kernels/plans/window.py, written
    again, so that what is measured is not checked by itself."""
    window = min(window, length)
    leader = (i // stride * stride + stride // 2).clamp(max=length - 1)
    lo = (leader - window // 2).clamp(0, length - window)
    return lo, lo + window


def units(row: Row, layout: Layout) -> tuple[Triple, Triple]:
    """What a coordinate is divided by before the formula, and the lengths of the axes then."""
    if row.unit == "tile":
        return layout.tile, layout.tiles
    return (1, 1, 1), layout.grid.shape


def visible(row: Row, layout: Layout, coords: torch.Tensor, head: int, queries: torch.Tensor) -> torch.Tensor:
    """(n, S) bool: which keys each of n queries sees, from coordinates alone.

    Args:
        coords: (3, S) coordinates of the tokens in any order, −1 for text.
        queries: (n,) positions in that order.
    """
    windows = row.windows(layout)
    window = windows[head if len(windows) > 1 else 0]
    size, lengths = units(row, layout)
    is_text = coords[0] < 0
    seen = torch.ones(len(queries), coords.shape[1], dtype=torch.bool, device=coords.device)
    for axis in range(3):
        at = coords[axis] // size[axis]
        lo, hi = interval(at[queries], lengths[axis], window[axis], row.stride[axis])
        seen &= (at >= lo[:, None]) & (at < hi[:, None])
    return seen | is_text | is_text[queries][:, None]


FULL = (999, 999, 999)
PAPER = STA(window=(3, 3, 3), tile=(6, 8, 8))
MIXED = (*(((3, 3, 3), (3, 1, 10), (5, 5, 5)) * 8)[:22], FULL, FULL)
HUNYUAN, WAN_480, WAN_720 = (30, 48, 80), (21, 30, 52), (21, 45, 80)


def _paper(
    name: str, window: Triple | tuple[Triple, ...], text: int = 0, head_dim: int = 128, flex: bool = False
) -> Row:
    method = STA(window=window, tile=(6, 8, 8))
    return Row(name, Grid(*HUNYUAN, text=text), 24, head_dim, method, ("tile order",) if flex else ())


GPU_ROWS = [
    _paper("STA 30×48×80, window (3,3,3)", (3, 3, 3), flex=True),
    _paper("STA 30×48×80, window (3,1,10)", (3, 1, 10)),
    _paper("STA 30×48×80, window (5,5,5)", (5, 5, 5)),
    _paper("STA 30×48×80, windows mixed over heads", MIXED),
    _paper("full window 30×48×80", FULL),
    Row("neighborhood 30×48×80, window 18×24×24", Grid(*HUNYUAN), 24, 128, TokenWindow((18, 24, 24))),
    Row(
        "neighborhood 30×48×80, window 18×24×24, stride 6×8×8",
        Grid(*HUNYUAN),
        24,
        128,
        TokenWindow((18, 24, 24), (6, 8, 8), (6, 8, 8)),
    ),
    _paper("STA 30×48×80 + 256 text, window (3,3,3)", (3, 3, 3), text=256),
    _paper("STA 30×48×80, window (3,3,3), head dim 64", (3, 3, 3), head_dim=64),
    Row("STA 18×48×80, window (3,3,3)", Grid(18, 48, 80), 24, 128, PAPER),
    *(
        Row(f"STA {'×'.join(map(str, shape))}, window (3,3,3), {heads} heads", Grid(*shape), heads, 128, STA())
        for shape in (WAN_480, WAN_720, (33, 45, 80))
        for heads in (12, 40)
    ),
    Row("full window 21×30×52, 12 heads", Grid(*WAN_480), 12, 128, STA(window=FULL)),
    Row(
        "inward 31×53 on 21×68×120, 12 heads",
        Grid(21, 68, 120),
        12,
        128,
        TokenWindow((21, 31, 53)),
        ("tile order", "raster order"),
    ),
    Row("inward 45×79 on 21×135×240, 4 heads", Grid(21, 135, 240), 4, 128, TokenWindow((21, 45, 79))),
]
# At 128×128 and 256×256 pixels, as the method runs there: with chosen tiles and windows.
CPU_ROWS = [
    Row(f"demo {8 * across}×{8 * across}, {label}", Grid(9, across, across), 4, 64, method)
    for across in (16, 32)
    for label, method in (
        ("window (3,3,3)", STA()),
        ("density 0.4", STA(density=0.4)),
        ("density 0.25", STA(density=0.25)),
        ("density 0.15", STA(density=0.15)),
    )
]
_TILE = (2, 8, 8)  # 128 tokens: aligned blocks
TINY_ROWS = [
    Row("tiny STA", Grid(6, 16, 16), 2, 128, STA(window=(3, 1, 2), tile=_TILE), ("tile order", "raster order")),
    Row("tiny STA, windows mixed over heads", Grid(6, 16, 16), 2, 64, STA(window=((1, 1, 2), FULL), tile=_TILE)),
    Row("tiny STA + 40 text", Grid(5, 9, 10, text=40), 2, 64, STA(window=(1, 2, 1), tile=(2, 4, 4))),
    Row("tiny full window", Grid(6, 16, 16), 2, 64, STA(window=FULL, tile=_TILE)),
    Row("tiny neighborhood", Grid(6, 16, 16), 2, 64, TokenWindow((3, 5, 7))),
    Row("tiny neighborhood, stride = tile", Grid(6, 16, 16), 2, 64, TokenWindow((2, 8, 8), (2, 4, 4), (2, 4, 4))),
    Row("tiny inward", Grid(5, 12, 13), 2, 64, TokenWindow((5, 5, 7)), ("tile order", "raster order")),
]
