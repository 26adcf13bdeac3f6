"""The window family, one formula (DESIGN: sliding tile, inward window, generalized neighborhood attention).

Per axis of length L, window w ≤ L and stride s, query coordinate i sees the keys  start … start + w − 1  with

    leader = min((i // s)·s + s // 2, L − 1)
    start  = clamp(leader − w // 2, 0, L − w)

so that at a border the window shifts inward and keeps its size. A token is visible if all three axes agree; w ≥ L means the
whole axis. Counted in tiles with s = 1 this is sliding tile attention (STA, arXiv 2502.04507, §3.2); counted in tokens with
s = 1 the inward window of FreeSwim (arXiv 2511.14712, §3.2); with s > 1 generalized neighborhood attention
(arXiv 2504.16922, §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Layout


def window_start(i: torch.Tensor, length: int, window: int, stride: int = 1) -> torch.Tensor:
    """First visible key coordinate for each query coordinate ``i`` (integer tensor, any shape) along one axis.

    Args:
        i: query coordinates in [0, length).
        length: axis length L.
        window: window size w ≥ 1; clipped to L.
        stride: queries of the same stride group share a window.
    """
    window = min(window, length)
    leader = torch.clamp((i // stride) * stride + stride // 2, max=length - 1)
    return torch.clamp(leader - window // 2, 0, length - window)


def window_interval(i: torch.Tensor, length: int, window: int, stride: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible key coordinates [lo, hi) of each query coordinate along one axis."""
    lo = window_start(i, length, window, stride)
    return lo, lo + min(window, length)


def window_plan(
    layout: Layout,
    windows: Sequence[tuple[int, int, int]],
    *,
    unit: Literal["tile", "token"],
    stride: tuple[int, int, int] = (1, 1, 1),
    head_set: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """The plan of one window, or of several that heads choose from.

    Args:
        layout: token order and blocks.
        windows: G windows (t, h, w), in ``unit``; each entry ≥ 1, larger than the axis means the whole axis.
        unit: what the formula's coordinates count. "tile": blocks are wholly visible or not at all. "token": exact, the blocks
            that the border of a window crosses are partial.
        stride: the formula's stride, in ``unit``.
        head_set: (H,) which window each head uses; None: one shared window, or window h for head h.
        device: where the plan is built and kept.

    Raises:
        ValueError: for windows or strides below 1.
    """
    if any(len(w) != 3 or min(w) < 1 for w in windows) or not windows or min(stride) < 1:
        raise ValueError(f"window_plan: windows and stride must be triples of at least 1, got {windows} and {stride}")
    coords = (layout.block_tile.T if unit == "tile" else layout.coords).to(device)
    lengths = layout.tiles if unit == "tile" else layout.grid.shape
    first, last = _block_bounds(layout, coords, unit)

    full, partial, intervals = [], [], []
    for window in windows:
        sees_all = torch.ones(1, 1, dtype=torch.bool, device=device)
        sees_any = torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = []
        for axis in range(3):
            length, w, s = lengths[axis], window[axis], stride[axis]
            # start is monotone in i: a block's first and last coordinate bound what its rows see on this axis.
            lo_first, hi_first = window_interval(first[axis], length, w, s)
            lo_last, hi_last = window_interval(last[axis], length, w, s)
            key_first, key_last = first[axis][None], last[axis][None]
            sees_any = sees_any & (key_last >= lo_first[:, None]) & (key_first < hi_last[:, None])
            sees_all = sees_all & (key_first >= lo_last[:, None]) & (key_last < hi_first[:, None])
            rows += list(window_interval(coords[axis], length, w, s))
        full.append(sees_all)
        partial.append(sees_any & ~sees_all)
        intervals.append(torch.stack(rows))
    video = ~layout.is_text.to(device)
    full_map = torch.stack(full)[None] & video[:, None] & video[None, :]
    partial_map = torch.stack(partial)[None] & video[:, None] & video[None, :]
    if unit == "tile" or not bool(partial_map.any()):
        return plan_from_block_map(layout, full_map, head_set=head_set)
    return plan_from_block_map(layout, full_map, partial_map, intervals=torch.stack(intervals), head_set=head_set)


def _block_bounds(layout: Layout, coords: torch.Tensor, unit: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, N) smallest and largest coordinate of each block along each axis. Text blocks have −1."""
    if unit == "tile":
        return coords, coords
    of_block = torch.arange(layout.blocks).repeat_interleave(layout.block_rows).to(coords.device).expand(3, -1)
    room = torch.zeros(3, layout.blocks, dtype=coords.dtype, device=coords.device)
    first = room.scatter_reduce(1, of_block, coords, "amin", include_self=False)
    last = room.scatter_reduce(1, of_block, coords, "amax", include_self=False)
    return first, last
