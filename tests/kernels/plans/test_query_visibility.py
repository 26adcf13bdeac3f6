"""What one query sees is its row of the mask: against the whole mask, on windows whole and partial, with text and heads."""

from __future__ import annotations

import pytest
import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.cells import cell_layout
from tilewise.kernels.plans.far_field import with_far_field
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.query_visibility import cells_of_query, region_of_query
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.methods.sta import STA

GRIDS = [Grid(3, 5, 7), Grid(1, 6, 6), Grid(4, 6, 5, text=9), Grid(4, 6, 5, text=20, text_first=True)]


def by_mask(plan: BlockPlan, layout: Layout, position: tuple[int, int, int], head: int, heads: int, sample: int = 0):
    """The naive answer: the whole mask in raster order, then one row of it."""
    mask = plan.to_mask(heads)
    mask = mask[min(sample, len(mask) - 1), head][layout.inverse][:, layout.inverse]
    grid = layout.grid
    first = grid.text if grid.text_first else 0
    video = mask[first : first + grid.video, first : first + grid.video]
    t, h, w = position
    return video[(t * grid.h + h) * grid.w + w].reshape(grid.shape)


def positions(grid: Grid) -> list[tuple[int, int, int]]:
    return [(0, 0, 0), (grid.t - 1, grid.h - 1, grid.w - 1), (grid.t // 2, grid.h // 2, grid.w // 3)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("unit", ["tile", "token"])
def test_windows(grid, unit):
    layout = Layout(grid, (2, 3, 2), 16)
    windows = [(1, 1, 1), (3, 2, 3), (9, 9, 9)] if unit == "tile" else [(3, 3, 3), (1, 4, 2), (9, 2, 9)]
    plan = window_plan(layout, windows, unit=unit)
    for head in range(len(windows)):
        for position in positions(grid):
            region = region_of_query(plan, layout, position, head)
            assert region.dtype == torch.bool
            assert region[position]
            assert torch.equal(region, by_mask(plan, layout, position, head, len(windows)))


def test_a_token_window_is_exact():
    grid = Grid(3, 6, 8)
    layout = Layout(grid, (3, 2, 3))
    plan = window_plan(layout, [(3, 3, 5)], unit="token")
    assert plan.work > plan.density  # some blocks are partial
    region = region_of_query(plan, layout, (1, 3, 4), 0)
    expected = torch.zeros(3, 6, 8, dtype=torch.bool)
    expected[:, 2:5, 2:7] = True
    assert torch.equal(region, expected)
    corner = region_of_query(plan, layout, (0, 0, 7), 0)
    expected = torch.zeros(3, 6, 8, dtype=torch.bool)
    expected[:, :3, 3:] = True  # the window shifts inward and keeps its size
    assert torch.equal(corner, expected)


def test_heads_that_share_lists():
    grid = Grid(3, 6, 6)
    method = STA(window=((1, 1, 1), (3, 3, 3), (1, 1, 1), (1, 3, 1)), tile=(1, 2, 2))
    layout = method.layout(grid)
    plan = method.plan(layout, 4, torch.device("cpu"))
    assert plan.sets == 3
    for head in range(4):
        for position in positions(grid):
            assert torch.equal(
                region_of_query(plan, layout, position, head), by_mask(plan, layout, position, head, heads=4)
            )


def test_lists_of_each_sample():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2))
    torch.manual_seed(0)
    full = torch.rand(2, 3, layout.blocks, layout.blocks) < 0.4
    full |= torch.eye(layout.blocks, dtype=torch.bool)
    plan = plan_from_block_map(layout, full)
    for sample in range(2):
        for head in range(3):
            region = region_of_query(plan, layout, (1, 2, 1), head, sample=sample)
            assert torch.equal(region, by_mask(plan, layout, (1, 2, 1), head, 3, sample))


def test_what_cannot_be_asked():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2))
    plan = window_plan(layout, [(1, 1, 1), (2, 2, 2)], unit="tile")
    with pytest.raises(ValueError, match=r"position \(2, 0, 0\).*2×4×4"):
        region_of_query(plan, layout, (2, 0, 0), 0)
    with pytest.raises(ValueError, match=r"no head 2.*lists for 2"):
        region_of_query(plan, layout, (0, 0, 0), 2)
    with pytest.raises(ValueError, match=r"32 queries.*has 48"):
        region_of_query(plan, Layout(Grid(3, 4, 4), (1, 2, 2)), (0, 0, 0), 0)
    full = torch.ones(2, 1, layout.blocks, layout.blocks, dtype=torch.bool)
    with pytest.raises(ValueError, match="no sample 2"):
        region_of_query(plan_from_block_map(layout, full), layout, (0, 0, 0), 0, sample=2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_means_cover_what_a_window_of_tiles_leaves_out(grid):
    layout = cell_layout(grid, (2, 3, 4), (2, 2, 2))
    plan = with_far_field(window_plan(layout, [(1, 1, 1), (3, 1, 1)], unit="tile"), layout)
    for head in range(2):
        for position in positions(grid):
            region = region_of_query(plan, layout, position, head)
            cells = cells_of_query(plan, layout, position, head)
            assert torch.equal(cells > 0, ~region)
            # Each number is one box of a tile.
            for number in cells.unique().tolist()[1:]:
                at = (cells == number).nonzero()
                assert len((at // torch.tensor([2, 3, 4])).unique(dim=0)) == 1
                assert len((at % torch.tensor([2, 3, 4]) // 2).unique(dim=0)) == 1


def test_without_a_far_field_nothing_is_a_mean():
    layout = cell_layout(Grid(2, 8, 8), (2, 4, 4), (2, 2, 2))
    plan = window_plan(layout, [(1, 1, 1)], unit="tile")
    assert not cells_of_query(plan, layout, (0, 0, 0), 0).any()
    token = with_far_field(window_plan(layout, [(1, 3, 3)], unit="token"), layout)
    region, cells = region_of_query(token, layout, (1, 4, 4), 0), cells_of_query(token, layout, (1, 4, 4), 0)
    assert not (region & (cells > 0)).any() and (cells > 0).any()
