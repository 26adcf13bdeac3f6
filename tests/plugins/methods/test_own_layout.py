"""A method with a token order of its own, a subclass of Layout, where text of several lengths joins the sequence."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import family_checks
import pytest
import test_hunyuan_video
import test_qwen_image
import torch

import tilewise
from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout


@dataclasses.dataclass(frozen=True)
class BackwardLayout(Layout):
    """The video tokens from last to first, text where it is."""

    shift: int = 0

    @cached_property
    def permutation(self) -> torch.Tensor:
        order = torch.arange(self.grid.tokens)
        first = self.grid.text if self.grid.text_first else 0
        video = slice(first, first + self.grid.video)
        order[video] = order[video].flip(0).roll(self.shift)
        return order


@dataclasses.dataclass(frozen=True)
class Backward(tilewise.Method):
    """Each block of 16 tokens sees itself and the next one, in that order."""

    name = "backward-for-this-test"

    def layout(self, grid: Grid) -> BackwardLayout:
        return BackwardLayout(grid, (1, 1, 16), 16, shift=5)

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        at = torch.arange(layout.blocks)
        full = (at[:, None] - at[None, :]).abs() <= 1
        return plan_from_block_map(layout, full[None, None].to(device))


CASES = {
    "text last": lambda: (test_hunyuan_video.tiny(), test_hunyuan_video.inputs(None, (2, 10, 16), (9, 4)), (2, 5, 8)),
    "text first": lambda: (
        test_qwen_image.tiny(),
        test_qwen_image.inputs((1, 6, 16), mask=test_qwen_image.PADDED.expand(2, -1)),
        (1, 6, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_kept_for_text_of_every_length(case):
    """The plan for each text length must be of the method's own order: of the base class's it would show other tokens."""
    model, inputs, _ = CASES[case]()
    with tilewise.patched(model, Backward(), steps=(0, 1), strict=True):
        family_checks.forward(model, inputs)
        grid = model._tilewise.state.grid
    family_checks.sparse_is_masked_stock(model, inputs, grid, Backward())
