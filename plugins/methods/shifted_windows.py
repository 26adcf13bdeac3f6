"""``shifted-windows``: attention in four large windows that are shifted at random (HiDiffusion, arXiv 2311.17528, §4.3, MSW-MSA).

On the largest feature maps of a UNet each query sees the quarter of the map that it is in. The map, h × w, is rolled by k/4 of a
window before it is cut into 2 × 2 windows of ⌈h/2⌉ × ⌈w/2⌉, where k = 0, 1, 2 or 3 is drawn for each layer and step:

    shift = k · (⌊⌈h/2⌉ / 4⌋, ⌊⌈w/2⌉ / 4⌋)          window of (i, j) = ((i − shift_h) mod h ÷ ⌈h/2⌉,  (j − shift_w) mod w ÷ ⌈w/2⌉)

so that no border between windows stays in the picture. A map with an odd side has windows of two sizes; nothing is resampled.
The preset ``hidiffusion`` has the other half of the paper with it, the addition ``raunet``.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.rolled import own_tile_plan, rolled_layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Method, register
from tilewise.plugins.models.common.family import AttentionLayer
from tilewise.plugins.models.common.registry import family_of

SHIFTS = 4


@register
@dataclass(frozen=True)
class ShiftedWindows(Method):
    """Windows of a quarter of a UNet's largest maps, shifted at random.

    Args:
        seed: of the shifts; with the same seed a layer has the same shift at the same step.
        levels: of the UNet whose layers have windows, 0 the finest. Default: the finest with self-attention (0 of SD 1.5 and 2.1,
            1 of SDXL), filled in when a denoiser is patched. Layers of other levels are dense.

    Raises:
        ConfigError: for values that cannot be; when a denoiser is patched, for one whose layers do not have maps of their own.
    """

    seed: int = 0
    levels: tuple[int, ...] | None = None

    name: ClassVar[str] = "shifted-windows"
    source: ClassVar[str] = "HiDiffusion, arXiv 2311.17528"
    use: ClassVar[str] = "UNets past their training size"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"shifted-windows: seed must be a whole number, got {self.seed!r}")
        if self.levels is None:
            return
        good = isinstance(self.levels, list | tuple) and len(self.levels) > 0
        if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.levels):
            raise ConfigError(
                f"shifted-windows: levels must be whole numbers of at least 0, such as (0,), got {self.levels!r}"
            )
        object.__setattr__(self, "levels", tuple(self.levels))

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        family = family_of(denoiser)
        layers = [] if family is None else family.layers(denoiser)
        there = sorted({layer.downsample for layer in layers if layer.downsample is not None})
        if not there:
            raise ConfigError(
                f"shifted-windows is for UNets, whose layers have feature maps of their own; {type(denoiser).__name__} has one "
                "token grid. Use sta or neighborhood"
            )
        if self.levels is None:
            return dataclasses.replace(self, levels=(there[0],))
        if missing := sorted(set(self.levels) - set(there)):
            raise ConfigError(
                f"shifted-windows: {type(denoiser).__name__} has self-attention at the levels {there}, not at {missing}"
            )
        return self

    @property
    def needs_step(self) -> bool:
        return True

    def layout(self, grid: Grid) -> Layout | None:
        return self._layout(grid, 0)

    def map_layout(self, grid: Grid, layer: AttentionLayer, step: int | None) -> Layout | None:
        if self.levels is not None and layer.downsample not in self.levels:
            return None
        return self._layout(grid, shift_of(self.seed, 0 if step is None else step, layer.block))

    def _layout(self, grid: Grid, shift: int) -> Layout:
        window = -(-grid.h // 2), -(-grid.w // 2)
        roll = 0, window[0] // SHIFTS * shift, window[1] // SHIFTS * shift
        return rolled_layout(grid, (grid.t, *window), roll)

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        return own_tile_plan(layout, device)


@lru_cache(maxsize=4096)
def shift_of(seed: int, step: int, layer: int) -> int:
    """The shift of a layer at a denoising step, 0 … 3: the same on every machine."""
    return random.Random(f"{seed}/{step}/{layer}").randrange(SHIFTS)
