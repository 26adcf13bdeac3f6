"""Cells: their order within tiles, and what of each a window leaves out, counted token by token."""

from __future__ import annotations

import pytest
import torch

from tilewise.kernels.plans.cells import CellLayout, cell_layout, choose_cell
from tilewise.kernels.plans.far_field import with_far_field
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window import window_plan

GRIDS = [
    Grid(4, 7, 9),
    Grid(3, 6, 8, text=5),
    Grid(3, 6, 8, text=5, text_first=True, opposite=2),
    Grid(4, 12, 12),  # a tile has more rows than a block
    Grid(1, 1, 1),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("cell", [(3, 2, 2), (1, 3, 4), (9, 9, 1)])
def test_each_cell_is_a_run_of_its_tile(grid, cell):
    layout = cell_layout(grid, (4, 6, 8), cell)
    plain = Layout(grid, (4, 6, 8))
    assert torch.equal(layout.permutation[layout.inverse], torch.arange(grid.tokens))
    assert torch.equal(layout.block_rows, plain.block_rows)
    boxes = set()
    for start, rows in zip(layout.cell_start.tolist(), layout.cell_rows.tolist(), strict=True):
        coords = layout.coords[:, start : start + rows]
        box = [
            coords // torch.tensor((4, 6, 8))[:, None],
            coords % torch.tensor((4, 6, 8))[:, None] // torch.tensor(cell)[:, None],
        ]
        here = {tuple(column) for column in torch.cat(box).T.tolist()}
        assert len(here) == 1 and not here & boxes and int(coords.min()) >= 0  # one cell of one tile, once, and no text
        boxes |= here
    assert int(layout.cell_rows.sum()) == grid.video
    # The tokens of a tile are those of the plain layout, in another order.
    tiles = [x.coords // torch.tensor((4, 6, 8))[:, None] for x in (layout, plain)]
    assert torch.equal(*tiles)


@pytest.mark.parametrize("cell", [(2, 2, 2), (4, 6, 8)], ids=["small", "whole tile"])
@pytest.mark.parametrize("unit", ["tile", "token"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tokens_outside_are_counted(grid, unit, cell):
    layout = cell_layout(grid, (2, 4, 4) if grid.t != 4 else (4, 6, 8), cell)
    windows = [(1, 1, 1), (3, 1, 3)] if unit == "tile" else [(3, 3, 3), (1, 5, 3)]
    plan = with_far_field(window_plan(layout, windows, unit=unit), layout)
    mask = plan.to_mask(2)[0]
    shares = []
    for head in range(2):
        pairs = 0
        for i, (first, rows) in enumerate(zip(layout.block_start.tolist(), layout.block_rows.tolist(), strict=True)):
            # What any query of the block sees; for windows in tokens, the box around it (a block may be no box).
            seen = mask[head, first : first + rows].any(0)
            if unit == "token" and not layout.is_text[i]:
                video = seen & (layout.coords[0] >= 0)
                low, high = (getattr(layout.coords[:, video], how)(1).values for how in ("min", "max"))
                seen |= ((layout.coords >= low[:, None]) & (layout.coords <= high[:, None])).all(0)
            cells = zip(layout.cell_start.tolist(), layout.cell_rows.tolist(), strict=True)
            want = torch.tensor([int((~seen[s : s + n]).sum()) for s, n in cells])
            got = torch.zeros(len(want)) if plan.far is None else plan.far.bias[head, i].exp()
            torch.testing.assert_close(got, want.float())
            pairs += rows * int((want > 0).sum())
        shares.append(pairs / grid.tokens**2)
    assert plan.cost - plan.density == pytest.approx(sum(shares) / 2)


def test_one_window_of_several_counts_by_heads():
    layout = cell_layout(Grid(2, 8, 8), (2, 4, 4), (2, 2, 2))
    windows, of_head = [(1, 1, 1), (1, 1, 2)], torch.tensor([0, 1, 1, 1])
    plan = with_far_field(window_plan(layout, windows, unit="tile", head_set=of_head), layout)
    each = [with_far_field(window_plan(layout, [w], unit="tile"), layout) for w in windows]
    assert plan.cost == pytest.approx((each[0].cost + 3 * each[1].cost) / 4)
    moved = plan.to("cpu")
    assert moved.far is not None and torch.equal(moved.far.bias, plan.far.bias)


def test_nothing_is_left_out():
    layout = cell_layout(Grid(2, 8, 8), (2, 4, 4), (2, 2, 2))
    assert with_far_field(window_plan(layout, [(1, 9, 9)], unit="tile"), layout).far is None


def test_chosen_cells_divide_the_tile():
    assert choose_cell((3, 4, 4)) == choose_cell((6, 8, 8)) == (3, 2, 2)
    assert choose_cell((1, 8, 16)) == (1, 4, 4)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1 token"):
        CellLayout(Grid(2, 8, 8), (2, 4, 4), 128, (0, 2, 2))
    layout = cell_layout(Grid(2, 8, 8), (2, 4, 4), (2, 2, 2))
    with pytest.raises(ValueError, match="over the 128 tokens"):
        with_far_field(window_plan(Layout(Grid(2, 4, 4), (2, 4, 4)), [(1, 1, 1)], unit="tile"), layout)
