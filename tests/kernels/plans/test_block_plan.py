"""Plans list exactly the pairs that the window formula keeps, and count them rightly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import CASE_IDS, CASES, Case, layout_mask

from tilewise.kernels.plans.block_plan import dense_plan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window import window_interval


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_plan_is_the_naive_mask(case):
    plan, mask = case.plan(), layout_mask(case)
    assert torch.equal(plan.to_mask(case.heads)[0], mask)
    assert plan.density == pytest.approx(mask.double().mean().item(), abs=1e-9)
    assert plan.work >= plan.density - 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if math.prod(c.tile) <= c.block], ids=lambda c: c.name)
def test_only_blocks_with_a_visible_pair_are_listed(case):
    """Where tiles are boxes of one block; what nobody sees costs a kernel as much as what everybody does."""
    plan, mask = case.plan(), layout_mask(case)
    of_row = torch.repeat_interleave(plan.q_rows.long())
    by_block = torch.zeros(case.heads, len(plan.q_rows), len(plan.q_rows)).index_put(
        (torch.arange(case.heads)[:, None, None], of_row[:, None], of_row), mask.float(), accumulate=True
    )
    listed = plan.ends[0, plan.sets_of_heads(case.heads).long(), :, 2]
    assert torch.equal(listed, (by_block > 0).sum(-1, dtype=torch.int32))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    unit=st.sampled_from(["tile", "token"]),
    text=st.sampled_from([0, 3]),
)
@settings(max_examples=40, deadline=None)
def test_random_windows(shape, tile, window, unit, text):
    case = Case("random", Grid(*shape, text=text), tile, (window,), unit=unit, heads=1, block=16)
    plan, mask = case.plan(), layout_mask(case)
    assert torch.equal(plan.to_mask(1)[0], mask)
    assert plan.density == pytest.approx(mask.double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_window_keeps_its_size_and_moves_one_way(length, stride):
    for window in range(1, length + 3):
        lo, hi = window_interval(torch.arange(length), length, window, stride)
        assert bool((hi - lo == min(window, length)).all())
        assert bool((lo >= 0).all())
        assert bool((hi <= length).all())
        assert bool((lo.diff() >= 0).all())


def test_full_runs_before_ragged_before_partial():
    case = next(c for c in CASES if c.name == "token window, text")
    plan = case.plan()
    lists, ends = plan.index[0], plan.ends[0]
    for g in range(plan.sets):
        for i in range(plan.index.shape[2]):
            complete, ragged, _ = ends[g, i].tolist()
            rows = plan.k_rows[lists[g, i].long()]
            assert bool((rows[:complete] == plan.block).all())
            assert bool((rows[complete:ragged] < plan.block).all())


def test_dense_plan_keeps_everything():
    plan = dense_plan(Layout(Grid(3, 4, 5, text=3), (2, 2, 2), 16))
    assert plan.is_dense
    assert plan.density == 1.0
    assert bool(plan.to_mask(2).all())


def test_wrong_maps_are_refused():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2))
    with pytest.raises(ValueError, match=r"full must be \(P, G, 8, 8\)"):
        plan_from_block_map(layout, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    maps = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="intervals"):
        plan_from_block_map(layout, maps, maps)
