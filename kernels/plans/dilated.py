"""Windows from per-axis tables, and the token order that makes dilated windows contiguous.

Dilation d splits an axis into d residue classes, i mod d, and each query sees a window of its own class alone. Written one
class after the other,

    c(i) = offset[i mod d] + i // d            offset[r] = sizes of the classes before r

a class is a run of coordinates and a window an interval again: the plan, its interval tests and the kernels are those of any
other window, on virtual coordinates c. Only the token order knows the difference (``DilatedLayout``).

Along an axis, lo and hi of the visible keys [lo, hi) never fall as c rises, within a class and from one class to the next; so a
block's first and last coordinate bound what its rows see, as in ``window_plan``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, block_reduce, plan_from_block_map
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout
from tilewise.kernels.plans.window import window_interval

Triple = tuple[int, int, int]
Axis = tuple[torch.Tensor, torch.Tensor]  # lo, hi (exclusive) of the keys that each (virtual) coordinate sees


@dataclass(frozen=True)
class DilatedLayout(Layout):
    """A layout whose tiles are boxes of virtual coordinates: residue classes one after the other along each axis.

    ``coords`` and ``raster_coords`` are virtual; ``permutation`` and ``inverse`` speak of the model's sequence.
    """

    dilation: Triple = (1, 1, 1)

    @cached_property
    def permutation(self) -> torch.Tensor:
        t, h, w = (axis_order(n, d) for n, d in zip(self.grid.shape, self.dilation, strict=True))
        raster = (t[:, None, None] * self.grid.h + h[:, None]) * self.grid.w + w  # of each virtual raster position
        return self._beside_text(raster.reshape(-1)[self._video_order])

    @cached_property
    def coords(self) -> torch.Tensor:
        coords = torch.full((3, self.grid.tokens), -1, device="cpu")
        start = self.grid.text if self.grid.text_first else 0
        coords[:, start : start + self.grid.video] = self.raster_coords[:, self._video_order]
        return coords


_IN_USE: WeakValueDictionary[tuple[Any, ...], DilatedLayout] = WeakValueDictionary()


def dilated_layout(grid: Grid, tile: Triple, dilation: Triple, max_block_rows: int = MAX_BLOCK_ROWS) -> DilatedLayout:
    """The same layout object for the same arguments as long as somebody holds it."""
    key = (grid, tile, dilation, max_block_rows)
    found = _IN_USE.get(key)
    if found is None:
        found = _IN_USE[key] = DilatedLayout(grid, tile, max_block_rows, dilation)
    return found


def axis_order(length: int, dilation: int) -> torch.Tensor:
    """(length,) int64: the real coordinate at each virtual one: class 0 first, each in order."""
    return torch.cat([torch.arange(r, length, dilation, device="cpu") for r in range(min(dilation, length))])


def axis_windows(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Axis:
    """lo and hi, (length,) int64, of the virtual coordinates that each virtual coordinate of an axis sees.

    Causal: query i sees the keys  max(0, leader − w + 1) … i,  leader = min((i // s)·s + s − 1, L − 1), of its class.

    Raises:
        ValueError: for sizes below 1, or a causal window shorter than its stride, which some queries would see nothing of.
    """
    if min(length, window, stride, dilation) < 1:
        raise ValueError(f"axis_windows: sizes must be at least 1, got {length}, {window}, {stride}, {dilation}")
    if causal and stride > min(window, length):
        raise ValueError(f"axis_windows: a causal window of {window} must be at least as long as its stride {stride}")
    lo, hi = [], []
    offset = 0
    for r in range(min(dilation, length)):
        size = len(range(r, length, dilation))
        i = torch.arange(size, device="cpu")
        if causal:
            leader = torch.clamp(i // stride * stride + stride - 1, max=size - 1)
            first, last = torch.clamp(leader - window + 1, min=0), i + 1
        else:
            first, last = window_interval(i, size, window, stride)
        lo.append(first + offset)
        hi.append(last + offset)
        offset += size
    return torch.cat(lo), torch.cat(hi)


def axes_plan(
    layout: Layout,
    axes: Sequence[Axis],
    device: torch.device | str = "cpu",
    *,
    key_layout: Layout | None = None,
) -> BlockPlan:
    """The plan in which a token sees those whose three coordinates lie in the intervals that its own three give.

    Args:
        layout: token order; its ``coords`` are what the tables are indexed by.
        axes: for t, h and w: lo and hi, (length,), neither ever falling along the axis.
        key_layout: token order of the keys, whose ``coords`` lo and hi speak of, if it is another.
    """
    keys = layout if key_layout is None else key_layout
    coords = layout.coords.to(device)
    q_first, q_last = (block_reduce(coords, layout.block_rows.to(device), how) for how in ("amin", "amax"))
    k_first, k_last = (
        block_reduce(keys.coords.to(device), keys.block_rows.to(device), how)[:, None] for how in ("amin", "amax")
    )
    sees_all = torch.ones(1, 1, dtype=torch.bool, device=device)
    sees_any = torch.ones(1, 1, dtype=torch.bool, device=device)
    rows = []
    for axis, tables in enumerate(axes):
        lo, hi = (table.to(device) for table in tables)
        first, last = q_first[axis].clamp(min=0), q_last[axis].clamp(min=0)  # text blocks have −1, and are full anyway
        sees_any = sees_any & (k_last[axis] >= lo[first][:, None]) & (k_first[axis] < hi[last][:, None])
        sees_all = sees_all & (k_first[axis] >= lo[last][:, None]) & (k_last[axis] < hi[first][:, None])
        at = coords[axis].clamp(min=0)
        rows += [lo[at], hi[at]]
    video = ~layout.is_text.to(device)[:, None] & ~keys.is_text.to(device)
    full = (sees_all & video)[None, None]
    partial = (sees_any & ~sees_all & video)[None, None]
    if not bool(partial.any()):
        return plan_from_block_map(layout, full, key_layout=key_layout)
    return plan_from_block_map(layout, full, partial, key_layout=key_layout, intervals=torch.stack(rows)[None])
