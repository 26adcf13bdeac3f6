"""Ways to choose key blocks at one density, ours and others', for the quality tables.

"paper's selection" is DraftAttention's (arXiv 2505.14708): means alone, the best pairs of each head's whole map, and nothing in
the place of what is skipped; with the grid's default tile, and with the paper's own. Its query blocks without any key get their
best one here: the paper's leave them with an output of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.methods.auto import Auto
from tilewise.plugins.methods.base import Method
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod, DraftMap
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.methods.xattention import XAttention

DENSITIES = (0.5, 0.25, 0.1)
OURS, PAPER = "draft (ours)", "draft, paper's selection"
CALIBRATED = "draft, calibrated"  # the density is divided among heads, layers and noise levels by a calibration


@dataclass(frozen=True)
class RandomBlocks(BlockSelectionMethod):
    """Any blocks, beside each block's own: what choosing is worth. Other ones at each call, the same in each run."""

    name: ClassVar[str] = "random"

    def draft(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float) -> DraftMap:
        size = (query.shape[0], query.shape[2], layout.blocks, layout.blocks)
        generator = torch.Generator(query.device).manual_seed(0)
        return DraftMap(torch.randn(size, generator=generator, device=query.device))


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
