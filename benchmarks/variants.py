"""Ways to choose key blocks at one density, ours and others', for the quality tables.

"paper's selection" is DraftAttention's (arXiv 2505.14708): means alone, the best pairs of each head's whole map, and nothing in
the place of what is skipped; with the grid's default tile, and with the paper's own. Its query blocks without any key get their
best one here: the paper's leave them with an output of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import method_table
from benchmarks.method_table import RandomBlocks
from tilewise.plugins.methods.auto import Auto
from tilewise.plugins.methods.base import Method
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.methods.xattention import XAttention

DENSITIES = (0.5, 0.25, 0.1)
OURS, PAPER = "draft (ours)", "draft, paper's selection"
CALIBRATED = "draft, calibrated"  # the density is divided among heads, layers and noise levels by a calibration


def windows() -> dict[str, Method]:
    """One window, whatever the density that is asked for, and what stands for the keys outside of it."""
    window: dict[str, Any] = {"window": (3, 3, 3), "tile": (3, 4, 4)}
    return {
        "window 3×3×3 of 3×4×4": STA(**window),
        "window 3×3×3 of 3×4×4, a mean a tile": STA(**window, far="tiles"),
        "window 3×3×3 of 3×4×4, cells 3×2×2": STA(**window, far="cells", cell=(3, 2, 2)),
        "window 3×3×3 of 3×4×4, cells 1×2×2": STA(**window, far="cells", cell=(1, 2, 2)),
    }


def variants(density: float) -> dict[str, Method]:
    """Name → method. None stays dense for being short."""
    common: dict[str, Any] = {"density": density, "min_tokens": 0}
    plain: dict[str, Any] = {**common, "compensate": False}
    paper: dict[str, Any] = {**plain, "variance": False, "always": ()}
    return {
        OURS: Draft(**common),
        CALIBRATED: Draft(**common),
        "auto": Auto(**common),
        "draft, each query": Draft(**common, each=True),
        "draft, ranked by mass": Draft(**common, rank="mass"),
        "draft, shared over heads": Draft(**common, select="shared"),
        "draft, tile (1,8,16)": Draft(**common, tile=(1, 8, 16)),
        "draft, tile (1,4,4)": Draft(**common, tile=(1, 4, 4)),
        "draft, tile (2,4,4)": Draft(**common, tile=(2, 4, 4)),
        "draft, tile (2,4,8)": Draft(**common, tile=(2, 4, 8)),
        "draft, tile (4,8,4)": Draft(**common, tile=(4, 8, 4)),
        "draft, tile (9,3,4)": Draft(**common, tile=(9, 3, 4)),
        "draft, not compensated": Draft(**plain),
        PAPER: Draft(**paper, select="head"),
        "draft, paper's selection and tile (1,8,16)": Draft(**paper, select="head", tile=(1, 8, 16)),
        "top-k": Draft(**paper, select="topk"),
        "xattention": XAttention(**plain),
        "xattention, compensated": XAttention(**common),
        "STA": STA(density=density),
        "STA, far field of tiles": STA(density=density, far="tiles"),
        "STA, far field of cells": STA(density=density, far="cells"),
        **windows(),
        "random blocks": RandomBlocks(**plain),
        "random blocks, compensated": RandomBlocks(**common),
    }


@dataclass(frozen=True)
class Choice:
    """Variants that are measured together. of: density → name → method. densities: by default. section: of the result file."""

    of: Callable[[float], dict[str, Method]]
    densities: tuple[float, ...]
    section: str


def choice(table: bool, section: str) -> Choice:
    """The table of methods, or the variants of ours; section: of the latter."""
    if table:
        return Choice(method_table.table, method_table.DENSITIES, f"{section}, methods")
    return Choice(variants, DENSITIES, section)
