"""Which tokens a query attends to in one head, step and block of a run: from the method's plan, without running anything, or,
for methods that decide by the queries and keys, from the calls of a run that was watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.cells import CellLayout
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.query_visibility import cells_of_query, query_row, region_of_query
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.plugins.config import select_blocks
from tilewise.plugins.methods.base import DynamicMethod, Method
from tilewise.plugins.models.common.family import AttentionLayer, Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.watch import WatchedCall


@dataclasses.dataclass(frozen=True)
class Place:
    """One query: t, h, w in tokens of the grid; head, block from 0; step from 1, as people count."""

    t: int
    h: int
    w: int
    head: int
    step: int
    block: int


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far each number of a `Place` goes: the grid of the block's layer, and how many heads, steps and blocks there are."""

    grid: Grid
    heads: int
    steps: int
    blocks: int

    def clamp(self, place: Place) -> Place:
        """The nearest place that there is."""

        def within(value: int, low: int, high: int) -> int:
            return min(max(int(value), low), high)

        return Place(
            within(place.t, 0, self.grid.t - 1), within(place.h, 0, self.grid.h - 1), within(place.w, 0, self.grid.w - 1),
            within(place.head, 0, self.heads - 1), within(place.step, 1, self.steps), within(place.block, 0, self.blocks - 1),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seen:
    """region: bool (T, H, W), None if it is decided only while the model runs. words: why it is what it is.

    means: int (T, H, W), the number of the cell by whose mean a token is seen, 0 for none; None without a far field.
    draft: float (T, H, W), the share of the query's attention that a dynamic method expected at each token; sums to about 1.
    """

    place: Place
    extent: Extent
    region: NDArray[np.bool_] | None
    words: str
    draft: NDArray[np.floating] | None = None
    means: NDArray[np.integer] | None = None


def layer_at(skeleton: Any, settings: GenerateSettings, block: int) -> tuple[AttentionLayer, Extent, torch.nn.Module]:
    """The first self-attention layer of a block (clamped) of the first denoiser, with what its queries range over."""
    denoiser = next(iter(denoisers_of(skeleton).values()))
    family = family_of(denoiser)
    assert family is not None
    grid = family.grid_of_size(denoiser, skeleton, Size(settings.height, settings.width, settings.frames))
    layers = family.layers(denoiser)
    blocks = 1 + max(layer.block for layer in layers)
    block = min(max(block, 0), blocks - 1)
    layer = min(layers, key=lambda layer: (abs(layer.block - block), layer.block))
    return layer, Extent(layer.grid(grid), layer.heads, settings.steps, blocks), denoiser


def seen_from(
    skeleton: Any,
    settings: GenerateSettings,
    place: Place,
    calls: Sequence[WatchedCall] = (),
    device: str | torch.device = "cpu",
) -> Seen:
    """What a query sees. skeleton: a pipeline, its weights are not read. place: clamped to what there is. calls: of a watched
    run with these settings, which dynamic methods need. device: that it would run on, by which such methods may stay dense.

    Raises ConfigError where the method does not fit the size.
    """
    layer, extent, denoiser = layer_at(skeleton, settings, place.block)
    place = extent.clamp(place)
    everything = np.ones(extent.grid.shape, bool)
    config = settings.method
    prepare = getattr(config.method, "prepare", None)  # methods that need to know the model first
    method = config.method if prepare is None else prepare(skeleton, denoiser)
    layout = method.layout(extent.grid)
    if layout is None:
        return Seen(place, extent, everything, f"{method.name} sees everything")
    if short := config.too_few(extent.grid.tokens, layer.downsample is not None, torch.device(device)):
        return Seen(place, extent, everything, f"dense: {short}")
    if not config.runs_at(place.step - 1, settings.steps):
        steps = config.steps
        part = (
            f"at the steps {steps}" if isinstance(steps, str) else f"from {steps[0]:.0%} to {steps[1]:.0%} of the steps"
        )
        return Seen(place, extent, everything, f"dense: the method runs {part}")
    if place.block not in select_blocks(config.blocks, extent.blocks):
        return Seen(place, extent, everything, f"dense: the method runs in blocks {config.blocks}")
    if isinstance(method, DynamicMethod):
        if short := method.stays_dense(extent.grid.tokens, torch.device(device)):
            return Seen(place, extent, everything, f"dense: {short}")
        return _watched(place, extent, method.name, calls)
    plan, position = _plan(method, layout, layer.heads), (place.t, place.h, place.w)
    region = region_of_query(plan, layout, position, place.head).numpy()
    means = cells_of_query(plan, layout, position, place.head).numpy() if isinstance(layout, CellLayout) else None
    return Seen(place, extent, region, f"{method.name}, tiles of {'×'.join(map(str, layout.tile))} tokens", means=means)


@lru_cache(maxsize=16)
def _plan(method: Method, layout: Layout, heads: int) -> BlockPlan:
    return method.plan(layout, heads, torch.device("cpu"))


def _watched(place: Place, extent: Extent, name: str, calls: Sequence[WatchedCall]) -> Seen:
    """What a call of a watched run let the query see. Of a step's forwards the first, which is the conditional one."""
    here = [call for call in calls if (call.block, call.step) == (place.block, place.step - 1)]
    if not here:
        return Seen(place, extent, None, f"{name} decides it from the queries and keys: watch a run of this block")
    call = min(here, key=lambda call: call.branch)
    if call.plan is None or call.layout is None:
        return Seen(place, extent, np.ones(extent.grid.shape, bool), f"this call ran dense ({call.kind})")
    position = (place.t, place.h, place.w)
    region = region_of_query(call.plan, call.layout, position, place.head).numpy()
    draft = None if call.draft is None else draft_of_query(call.draft[0, place.head], call.layout, position)
    return Seen(place, extent, region, f"{name}, as it decided in the watched run", draft)


def draft_of_query(draft: torch.Tensor, layout: Layout, position: tuple[int, int, int]) -> NDArray[np.floating]:
    """(T, H, W): the row of a block map (N, N) that belongs to a query, each block's share spread evenly over its tokens."""
    grid = layout.grid
    block = int(torch.searchsorted(layout.block_start, query_row(layout, position), right=True)) - 1
    row = draft[block].float() / layout.block_rows
    tokens = row.repeat_interleave(layout.block_rows)[layout.inverse]
    return tokens[grid.video_start : grid.video_start + grid.video].reshape(grid.shape).numpy()
