"""What all methods with a fixed window share: a coarse far field for the keys that the window leaves out.

``far="cells"`` or ``"tiles"`` puts means of small boxes of tokens in their place, in the same softmax (far_field.py has the
formula).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.cells import CellLayout, Triple, cell_layout, choose_cell
from tilewise.kernels.plans.far_field import with_far_field
from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Method

FAR = ("cells", "tiles")


@dataclass(frozen=True, kw_only=True)
class WindowMethod(Method):
    """Options of window methods.

    Args:
        far: "cells": keys outside the window are seen as means of small cells; "tiles": as one mean a tile; None: not at all.
            ``density`` counts exact pairs, ``cost`` those with means too. Within ``draft`` and ``xattention`` (``within=``): None
            or "tiles", which are their tiles. Over the KV cache of a stream there is none: the window runs alone.
        cell: tokens (t, h, w) of a cell. Default: about 12 that divide the tile, such as (3, 2, 2). No cell reaches over a tile:
            one that is larger than the tile chosen for a grid is cut to it, and ``explain`` says so.

    Raises:
        ConfigError: for other values, ``cell`` without ``far="cells"``, or a cell larger than a tile that is given.
    """

    far: str | None = None
    cell: Triple | None = None

    def __post_init__(self) -> None:
        if self.far is not None and self.far not in FAR:
            raise ConfigError(f"{self.name}: far must be 'cells', 'tiles' or None, got {self.far!r}")
        if self.cell is None:
            return
        if self.far != "cells":
            raise ConfigError(f"{self.name}: cell={self.cell!r} is an option of far='cells', and far is {self.far!r}")
        object.__setattr__(self, "cell", triple(self.name, "cell", self.cell))

    def check_cell(self, tile: Triple) -> None:
        """Raises ConfigError for a cell that is larger than a tile that was given with it."""
        if self.cell is not None and any(size > most for size, most in zip(self.cell, tile, strict=True)):
            raise ConfigError(
                f"{self.name}: a cell of {self.cell} tokens does not fit into a tile of {tile}; give a cell of at most the tile "
                "on each axis, or a larger tile"
            )

    def with_cells(self, layout: Layout) -> Layout:
        """The layout of the method's tiles, made of cells if it has a far field."""
        if self.far is None:
            return layout
        cell = layout.tile if self.far == "tiles" else self.cell or choose_cell(layout.tile)
        return cell_layout(layout.grid, layout.tile, cell)

    def with_far(self, plan: BlockPlan, layout: Layout) -> BlockPlan:
        """The plan of the method's window over a layout, with the far field if there is one."""
        return with_far_field(plan, layout) if self.far is not None and isinstance(layout, CellLayout) else plan

    def describe_far(self, layout: Layout) -> dict[str, Any]:
        if isinstance(layout, CellLayout):
            said = f"means of {'×'.join(map(str, layout.cell))}"
            if self.cell is not None and self.cell != layout.cell:
                said += f": cell {'×'.join(map(str, self.cell))} cut to the tile"
            return {"far field": said}
        return {} if self.far is None else {"far field": "none over a KV cache"}


def triple(method: str, option: str, value: Any) -> Triple:
    """Three sizes (t, h, w) of at least 1; raises ConfigError for anything else."""
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
        raise ConfigError(f"{method}: {option} must be three whole numbers of at least 1, (t, h, w), got {value!r}")
    return (value[0], value[1], value[2])
