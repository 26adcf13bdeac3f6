"""Tiles of a rolled grid: the plan is the mask of torch.roll and a window partition."""

from __future__ import annotations

import pytest
import torch

from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.rolled import own_tile_plan, rolled_layout


@pytest.mark.parametrize("grid", [Grid(1, 8, 12), Grid(1, 7, 13), Grid(2, 30, 21), Grid(1, 1, 5)])
@pytest.mark.parametrize("roll", [(0, 0, 0), (0, 1, 3), (0, 6, 2)])
def test_plan_is_the_mask_of_a_rolled_partition(grid, roll):
    tile = grid.t, -(-grid.h // 2), -(-grid.w // 2)
    layout = rolled_layout(grid, tile, roll)
    h, w = torch.arange(grid.h)[:, None], torch.arange(grid.w)
    number = h // tile[1] * 2 + w // tile[2]  # of the window at each place of the rolled map
    number = torch.roll(number, roll[1:], (0, 1)).expand(grid.t, -1, -1).reshape(-1)
    want = number[:, None] == number
    plan = own_tile_plan(layout)
    got = plan.to_mask(1)[0, 0][layout.inverse][:, layout.inverse]
    assert torch.equal(got, want)
    assert plan.density == pytest.approx(float(want.double().mean()))
    assert sorted(layout.permutation.tolist()) == list(range(grid.tokens))


def test_attention_in_such_windows():
    generator = torch.Generator().manual_seed(0)
    layout = rolled_layout(Grid(1, 18, 22), (1, 9, 11), (0, 4, 2))
    q, k, v = torch.randn(3, 2, 396, 2, 16, generator=generator, dtype=torch.float64)
    there = layout.permutation
    got = block_sparse_attention(*(x[:, there].float() for x in (q, k, v)), own_tile_plan(layout))[:, layout.inverse]
    mask = own_tile_plan(layout).to_mask(2)[:, :, layout.inverse][:, :, :, layout.inverse]
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(
        1, 2
    )
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_layout_is_made_once():
    made = rolled_layout(Grid(1, 8, 8), (1, 4, 4), (0, 1, 1))
    assert rolled_layout(Grid(1, 8, 8), (1, 4, 4), (0, 1, 1)) is made
    assert rolled_layout(Grid(1, 8, 8), (1, 4, 4), (0, 2, 2)) != made
