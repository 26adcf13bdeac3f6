"""The tile chooser counts what a plan lists, exactly, and finds what trying every tile would find."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.tiling import PARTIAL_COST, choose_tile_for_window, window_work
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.methods.sta import choose_tile

small = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 9))
windows = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 10))
strides = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
tiles = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@given(
    shape=small,
    tile=tiles,
    window=windows,
    stride=strides,
    unit=st.sampled_from(["tile", "token"]),
    text=st.sampled_from([0, 3, 40]),
    max_rows=st.sampled_from([16, 32, 128]),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.slow
def test_counts_are_those_of_the_plan(shape, tile, window, stride, unit, text, max_rows):
    grid = Grid(*shape, text=text)
    layout = Layout(grid, tile, max_rows)
    if unit == "token" and math.prod(layout.tile) > max_rows:
        with pytest.raises(ValueError, match="more than one block"):
            window_work(grid, tile, window, unit=unit, stride=stride, max_rows=max_rows)
        return
    counted = window_work(grid, tile, window, unit=unit, stride=stride, max_rows=max_rows)
    plan = window_plan(layout, [window], unit=unit, stride=stride)
    assert counted.full == int(plan.ends[..., 1].sum())
    assert counted.full + counted.partial == int(plan.ends[..., 2].sum())
    assert counted.block == plan.block
    assert counted.work == pytest.approx(plan.work, rel=1e-12)
    assert counted.density == pytest.approx(plan.density, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 64, 65, 128])
def test_the_room_of_a_block_is_the_plans(rows):
    grid = Grid(1, 2, 2 * rows)
    plan = window_plan(Layout(grid, (1, 1, rows)), [(1, 1, 1)], unit="tile")
    assert window_work(grid, (1, 1, rows), (1, 1, 1), unit="tile").block == plan.block
    assert window_work(grid, (1, 1, rows), (1, 1, 1), unit="token").block == plan.block


@given(shape=small, window=windows, stride=strides, text=st.sampled_from([0, 20]))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_chosen_tile_is_the_cheapest_of_all(shape, window, stride, text):
    grid, max_rows = Grid(*shape, text=text), 16

    def price(tile):
        plan = window_plan(Layout(grid, tile, max_rows), [window], unit="token", stride=stride)
        full, listed = int(plan.ends[..., 1].sum()), int(plan.ends[..., 2].sum())
        return full + PARTIAL_COST * (listed - full)

    every = [t for t in itertools.product(*(range(1, n + 1) for n in shape)) if math.prod(t) <= max_rows]
    chosen = choose_tile_for_window(grid, window, stride, max_rows)
    assert chosen in every
    assert price(chosen) == pytest.approx(min(price(tile) for tile in every))


@pytest.mark.parametrize(
    ("shape", "window", "at_most"),
    [((21, 68, 120), (21, 31, 53), 0.23), ((21, 135, 240), (21, 45, 79), 0.12), ((31, 45, 80), (31, 15, 27), 0.15)],
)
def test_a_window_over_all_of_t_gets_tiles_over_all_of_t(shape, window, at_most):
    tile = choose_tile_for_window(Grid(*shape), window)
    assert tile[0] == shape[0]
    assert window_work(Grid(*shape), tile, window, unit="token").work <= at_most


def test_a_stride_of_whole_tiles_leaves_no_partial_block():
    grid, window, stride = Grid(30, 48, 80), (18, 24, 24), (6, 8, 8)
    counted = window_work(grid, choose_tile_for_window(grid, window, stride), window, unit="token", stride=stride)
    assert counted.partial == 0
    assert counted.waste == pytest.approx(1)


def test_partial_blocks_are_avoided_when_they_cost_much():
    grid, window = Grid(21, 68, 120), (21, 31, 53)

    def counted(cost):
        return window_work(grid, choose_tile_for_window(grid, window, partial_cost=cost), window, unit="token")

    cheap, dear = counted(1.0), counted(8.0)
    assert dear.partial < cheap.partial
    assert dear.work >= cheap.work


@pytest.mark.parametrize("bad", [{"window": (0, 1, 1)}, {"stride": (1, 0, 1)}, {"partial_cost": 0.5}])
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        choose_tile_for_window(Grid(2, 4, 4), **{"window": (1, 3, 3)} | bad)


@pytest.mark.parametrize("window", [(3, 3, 3), (3, 1, 5), (5, 5, 5), (99, 1, 3), (99, 99, 99)])
@pytest.mark.parametrize(
    "shape", [(21, 30, 52), (21, 45, 80), (33, 45, 80), (21, 68, 120), (30, 48, 80), (18, 48, 80), (21, 135, 240)]
)
def test_sta_tiles_waste_at_most_8_percent(shape, window):
    """On grids that no tile divides, too. Counted, not built: the plans have up to 6000 blocks."""
    counted = window_work(Grid(*shape), choose_tile(Grid(*shape)), window, unit="tile")
    assert counted.waste <= 1.08


def test_sta_waste_is_that_of_the_plan():
    grid = Grid(21, 45, 80)
    layout = Layout(grid, choose_tile(grid))
    plan = window_plan(layout, [(3, 3, 3)], unit="tile")
    assert plan.work / plan.density == pytest.approx(window_work(grid, layout.tile, (3, 3, 3), unit="tile").waste)


@pytest.mark.parametrize(
    ("shape", "across", "tile"),
    [
        ((9, 16, 16), 4, (3, 4, 4)),
        ((9, 16, 16), 8, (3, 2, 2)),
        ((9, 32, 32), 4, (3, 8, 9)),
        ((9, 32, 32), 8, (3, 4, 5)),
    ],
)
def test_the_demo_models_tiles_stay(shape, across, tile):
    """pipelines/demo_model/evaluation.json was measured with these."""
    assert choose_tile(Grid(*shape), across) == tile
