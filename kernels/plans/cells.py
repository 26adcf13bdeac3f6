"""Cells: small boxes of a tile that stand next to each other in the token order, so that one mean can speak for each.

    Layout(grid, tile=(3, 4, 4))                    a tile is a run of 48 tokens
    CellLayout(grid, tile=(3, 4, 4), cell=(3, 2, 2)) the same run, as 4 runs of 12: one run a cell

Cells at a tile's border may be smaller, as tiles are at the grid's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout, tile_counts
from tilewise.kernels.plans.mean_lists import MeanLists, mean_lists

Triple = tuple[int, int, int]
CELL_TOKENS = 12  # what a cell has that is chosen for a tile: 3×2×2 tokens of it, where they divide it


@dataclass(frozen=True)
class CellLayout(Layout):
    """A layout whose tiles are made of cells: raster order of the cells in a tile, and of the tokens in a cell.

    cell: (t, h, w) tokens. Clipped to the tile.
    """

    cell: Triple = (3, 2, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cell) != 3 or min(self.cell) < 1:
            raise ValueError(f"CellLayout: cell must be three sizes of at least 1 token (t, h, w), got {self.cell}")
        clipped = tuple(min(size, length) for size, length in zip(self.cell, self.tile, strict=True))
        object.__setattr__(self, "cell", clipped)

    @cached_property
    def _cell_of_token(self) -> torch.Tensor:
        """(video,) int64: number of the cell of each video token in raster order, counted through the tiles in their order."""
        tile, cell = (torch.tensor(size, device="cpu").view(3, 1) for size in (self.tile, self.cell))
        cells = tile_counts(self.tile, self.cell)
        number = torch.zeros(self.grid.video, dtype=torch.int64, device="cpu")
        for coords, counts in ((self._tile_of_token, self.tiles), (self.raster_coords % tile // cell, cells)):
            for axis in range(3):
                number = number * counts[axis] + coords[axis]
        return number

    @cached_property
    def _video_order(self) -> torch.Tensor:
        return torch.argsort(self._cell_of_token, stable=True)

    @cached_property
    def cell_rows(self) -> torch.Tensor:
        """(Nc,) int64: tokens of each cell, in the layout's order."""
        return torch.unique_consecutive(self._cell_of_token[self._video_order], return_counts=True)[1]

    @cached_property
    def cell_start(self) -> torch.Tensor:
        """(Nc,) int64: layout position of each cell's first token."""
        first = self.grid.text if self.grid.text_first else 0
        return self.cell_rows.cumsum(0) - self.cell_rows + first


@dataclass(frozen=True, eq=False)
class FarField:
    """Cells that stand for the keys which the queries of a block do not see: see ``far_field.py``.

    Attributes:
        start, rows: (Nc,) int32, first token and number of tokens of each cell, in the order of the keys.
        bias: (G, Nq, Nc) float32 for each head set of the plan: log of the cell's tokens that query block i does not see; −inf
            where it sees them all.
        share: pairs of a query and a cell ÷ all token pairs; mean over heads.
        usual: tokens of a cell that no border cuts.
    """

    start: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor
    share: float
    usual: int

    @cached_property
    def lists(self) -> MeanLists:
        """The blocks of cells that each query block sees."""
        return mean_lists(self.bias, float(torch.tensor(float(self.usual)).log()))

    def to(self, device: torch.device | str) -> FarField:
        """The same with its tensors on ``device``."""
        return FarField(self.start.to(device), self.rows.to(device), self.bias.to(device), self.share, self.usual)


def choose_cell(tile: Triple, tokens: int = CELL_TOKENS) -> Triple:
    """The cell for a tile: one that divides it, near a cube of so many ``tokens``, as far as these go together."""

    def cost(cell: Triple) -> tuple[float, int]:
        held = math.prod(tile_counts(tile, cell)) * math.prod(cell)
        free = [a for a, n in zip(cell, tile, strict=True) if n > 1] or [1]
        size = abs(math.log(math.prod(cell) / tokens))
        return size + 4 * math.log(held / math.prod(tile)) + 0.3 * math.log(max(free) / min(free)), -cell[0]

    t, h, w = (range(1, min(n, tokens) + 1) for n in tile)
    return min(itertools.product(t, h, w), key=cost)


_IN_USE: WeakValueDictionary[tuple[Any, ...], CellLayout] = WeakValueDictionary()


def cell_layout(grid: Grid, tile: Triple, cell: Triple) -> CellLayout:
    """The same layout object for the same arguments as long as somebody holds it."""
    key = (grid, tile, cell)
    found = _IN_USE.get(key)
    if found is None:
        found = _IN_USE[key] = CellLayout(grid, tile, MAX_BLOCK_ROWS, cell)
    return found
