"""Windows of a grid that was rolled: tiles begin at an offset and go on at the other end of the axis.

Rolled by r, position i of an axis of length L stands at (i − r) mod L, and the tiles are those of the rolled axis. The tile that
holds the end of an axis holds its begin too, as ``torch.roll`` before a window partition has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class RolledLayout(Layout):
    """A layout whose tiles are those of the grid rolled by ``roll`` tokens along (t, h, w). ``coords`` are the grid's own."""

    roll: Triple = (0, 0, 0)

    @cached_property
    def _tile_of_token(self) -> torch.Tensor:
        shape, roll, tile = (torch.tensor(x, device="cpu").view(3, 1) for x in (self.grid.shape, self.roll, self.tile))
        return (self.raster_coords - roll) % shape // tile


_IN_USE: WeakValueDictionary[tuple[Any, ...], RolledLayout] = WeakValueDictionary()


def rolled_layout(grid: Grid, tile: Triple, roll: Triple) -> RolledLayout:
    """The same layout object for the same arguments as long as somebody holds it."""
    key = (grid, tile, roll)
    found = _IN_USE.get(key)
    if found is None:
        found = _IN_USE[key] = RolledLayout(grid, tile, roll=roll)
    return found


def own_tile_plan(layout: Layout, device: torch.device | str = "cpu") -> BlockPlan:
    """Every query sees the keys of its own tile."""
    tile = layout.block_tile.to(device)
    return plan_from_block_map(layout, (tile[:, None] == tile[None]).all(-1)[None, None])
