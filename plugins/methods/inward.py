"""``inward``: a window as large as the frame that the model was trained on, around each token (FreeSwim, arXiv 2511.14712).

    window = (all of t,  2·⌊native_h / 2⌋ + 1,  2·⌊native_w / 2⌋ + 1)  tokens, shifted inward at borders: it keeps its size

Past its training size a model's dense attention spreads over more keys than it ever saw, and pictures get blurred or show
things twice. Here each query sees as many keys as in training. With it comes the paper's attention temperature, N tokens to a
native frame:

    scale = sqrt(log_N(2N) / head_dim)

A window alone does not know what the rest of the frame shows: see ``plugins/guidance/dual_path.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.kernels.plans.tiling import choose_tile_for_window
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.windows import WindowMethod
from tilewise.plugins.models.common.native_size import native_grid
from tilewise.plugins.models.common.registry import family_of

MAX_BLOCKS = 12_288  # block maps are N × N: beyond this, building one takes gigabytes


@register
@dataclass(frozen=True)
class Inward(WindowMethod):
    """Windows of the training size in height and width, exact to the token, and all frames.

    Args:
        native: (h, w), the training size in tokens of the denoiser's grid. Default: the pipeline's own, filled in when a
            pipeline is patched.
        temperature: whether attention is sharpened by the paper's scale. Only where the window leaves something out: on a
            grid of the native size or smaller the method is dense attention, unchanged.
        far, cell: what stands for the keys outside the window: see ``WindowMethod``.

    Raises:
        ConfigError: for sizes below 1; later, for a bare denoiser patched without ``native``.
    """

    native: tuple[int, int] | None = None
    temperature: bool = True

    name: ClassVar[str] = "inward"
    source: ClassVar[str] = "FreeSwim, arXiv 2511.14712"
    use: ClassVar[str] = "sizes past the training size"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.temperature, bool):
            raise ConfigError(f"inward: temperature must be true or false, got {self.temperature!r}")
        native = self.native
        if native is None:
            return
        good = isinstance(native, Sequence) and not isinstance(native, str) and len(native) == 2
        if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in native):
            raise ConfigError(
                f"inward: native must be two whole numbers of at least 1, (h, w) in tokens, got {native!r}"
            )
        object.__setattr__(self, "native", (native[0], native[1]))

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with the native size of ``target``'s model, if none was given.

        Raises:
            ConfigError: if the size cannot be found, or the denoiser's layers have feature maps of several sizes.
        """
        family = family_of(denoiser)
        if family is not None and any(layer.downsample is not None for layer in family.layers(denoiser)):
            raise ConfigError(
                f"inward: the layers of {type(denoiser).__name__} attend over feature maps of several sizes, and one native "
                "size does not fit them; the method is for denoisers with one token grid"
            )
        if self.native is not None:
            return self
        grid = native_grid(target, denoiser)
        return dataclasses.replace(self, native=(grid.h, grid.w))

    def window(self, grid: Grid) -> tuple[int, int, int]:
        """The window on a grid, (t, h, w) in tokens, no larger than the grid."""
        if self.native is None:
            raise ConfigError(
                f"inward: the native size is not known, so there is no window on the grid {grid}; give native=(h, w) in tokens"
            )
        h, w = (2 * (n // 2) + 1 for n in self.native)
        return grid.t, min(h, grid.h), min(w, grid.w)

    def layout(self, grid: Grid) -> Layout:
        return self.with_cells(cached_layout(grid, choose_tile_for_window(grid, self.window(grid))))

    def check_layout(self, layout: Layout) -> None:
        """Raises ConfigError for one that is too large to be planned."""
        if layout.blocks > MAX_BLOCKS:
            raise ConfigError(
                f"inward: the grid {layout.grid} has {layout.blocks} blocks, more than {MAX_BLOCKS}: the size is too large"
            )

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        self.check_layout(layout)
        plan = window_plan(layout, [self.window(layout.grid)], unit="token", device=device)
        return self.with_far(plan, layout)

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        """What queries times keys are multiplied with; None: as the model has it, 1 / sqrt(head_dim)."""
        if not self.temperature or self.native is None or self.window(layout.grid) == layout.grid.shape:
            return None
        tokens = math.prod(self.native)
        return math.sqrt(math.log(2 * tokens, tokens) / head_dim) if tokens > 1 else None

    def describe(self, layout: Layout) -> dict[str, Any]:
        return {"window (tokens)": self.window(layout.grid), **self.describe_far(layout)}
