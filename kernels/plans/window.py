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

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, block_reduce, plan_from_block_map
from tilewise.kernels.plans.layout import Layout, tile_counts

Triple = tuple[int, int, int]


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
    windows: Sequence[Triple],
    *,
    unit: Literal["tile", "token"],
    stride: Triple = (1, 1, 1),
    head_set: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    key_layout: Layout | None = None,
    query_offset: Triple = (0, 0, 0),
    key_offset: Triple = (0, 0, 0),
    shape: Triple | None = None,
) -> BlockPlan:
    """The plan of one window, or of several that heads choose from.

    Queries and keys may be two parts of one larger grid: boxes of it, each with a layout of its own. A chunk of 3 latent frames
    that attends to a KV cache of 12, itself the last 3 of them:

        window_plan(chunk, [(5, 9, 9)], unit="token", key_layout=cache, query_offset=(9, 0, 0))

    Args:
        layout: token order and blocks of the queries, and of the keys unless ``key_layout`` is given.
        windows: G windows (t, h, w), in ``unit``; each entry ≥ 1, larger than the axis means the whole axis.
        unit: what the formula's coordinates count. "tile": blocks are wholly visible or not at all; tiles are those of the keys'
            layout. "token": exact, the blocks that the border of a window crosses are partial.
        stride: the formula's stride, in ``unit``.
        head_set: (H,) which window each head uses; None: one shared window, or window h for head h.
        device: where the plan is built and kept.
        key_layout: token order and blocks of the keys.
        query_offset, key_offset: where the first token of each stands in the whole grid, in tokens (t, h, w).
        shape: of the whole grid, in tokens, whose borders windows keep within; None: it ends where the keys end.

    Raises:
        ValueError: for windows or strides below 1; queries or keys outside the whole grid; with unit="tile", blocks of queries
            or keys that do not lie in one tile of the whole grid.
    """
    if any(len(w) != 3 or min(w) < 1 for w in windows) or not windows or min(stride) < 1:
        raise ValueError(f"window_plan: windows and stride must be triples of at least 1, got {windows} and {stride}")
    keys = layout if key_layout is None else key_layout
    if shape is None:
        shape = _triple(at + n for at, n in zip(key_offset, keys.grid.shape, strict=True))
    for what, part, offset in (("queries", layout, query_offset), ("keys", keys, key_offset)):
        ends = [at + n for at, n in zip(offset, part.grid.shape, strict=True)]
        if min(offset) < 0 or any(end > n for end, n in zip(ends, shape, strict=True)):
            raise ValueError(
                f"window_plan: {what} {part.grid.shape} at {tuple(offset)} do not lie in the grid of {shape} tokens; give "
                "their offset in it, or its shape"
            )
    lengths = shape if unit == "token" else tile_counts(shape, keys.tile)
    tile = (1, 1, 1) if unit == "token" else keys.tile
    q_first, q_last = _block_bounds(layout, query_offset, tile, device)
    k_first, k_last = _block_bounds(keys, key_offset, tile, device)
    if unit == "tile" and not (torch.equal(q_first, q_last) and torch.equal(k_first, k_last)):
        raise ValueError(
            f"window_plan: a window of tiles needs every block in one tile of {tile} tokens of the whole grid; queries have "
            f"tiles of {layout.tile} from {tuple(query_offset)}, keys begin at {tuple(key_offset)}"
        )
    coords = layout.coords.to(device)

    full, partial, intervals = [], [], []
    for window in windows:
        sees_all = torch.ones(1, 1, dtype=torch.bool, device=device)
        sees_any = torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = []
        for axis in range(3):
            length, w, s = lengths[axis], window[axis], stride[axis]
            # start is monotone in i: a block's first and last coordinate bound what its rows see on this axis.
            lo_first, hi_first = window_interval(q_first[axis], length, w, s)
            lo_last, hi_last = window_interval(q_last[axis], length, w, s)
            key_first, key_last = k_first[axis][None], k_last[axis][None]
            sees_any = sees_any & (key_last >= lo_first[:, None]) & (key_first < hi_last[:, None])
            sees_all = sees_all & (key_first >= lo_last[:, None]) & (key_last < hi_first[:, None])
            if unit == "token":
                of_rows = window_interval(coords[axis] + query_offset[axis], length, w, s)
                rows += [end - key_offset[axis] for end in of_rows]  # in coordinates of the keys' own grid
        full.append(sees_all)
        partial.append(sees_any & ~sees_all)
        intervals.append(torch.stack(rows) if rows else torch.empty(0))
    video = ~layout.is_text.to(device)[:, None] & ~keys.is_text.to(device)
    full_map = torch.stack(full)[None] & video
    partial_map = torch.stack(partial)[None] & video
    if unit == "tile" or not bool(partial_map.any()):
        return plan_from_block_map(layout, full_map, key_layout=key_layout, head_set=head_set)
    return plan_from_block_map(
        layout, full_map, partial_map, key_layout=key_layout, intervals=torch.stack(intervals), head_set=head_set
    )


def _block_bounds(
    layout: Layout, offset: Triple, tile: Triple, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, N) smallest and largest coordinate of each block along each axis, in tiles of the whole grid. Text has 0."""
    coords, rows = layout.coords.to(device), layout.block_rows.to(device)
    at, size = (torch.tensor(triple, device=device)[:, None] for triple in (offset, tile))
    bounds = (block_reduce(coords, rows, how) for how in ("amin", "amax"))
    first, last = (torch.where(layout.is_text.to(device), 0, (x + at) // size) for x in bounds)
    return first, last


def _triple(sizes: Iterable[int]) -> Triple:
    t, h, w = sizes
    return (t, h, w)
