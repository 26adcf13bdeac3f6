"""Plans whose queries and keys have layouts of their own: what they list and count, against masks made pair by pair."""

import itertools

import pytest
import torch
from plan_cases import Case, naive_mask, two_layouts

from tilewise.kernels.plans.block_plan import dense_plan, plan_from_block_map
from tilewise.kernels.plans.dilated import axes_plan, axis_windows, dilated_layout
from tilewise.kernels.plans.dynamic_plan import dynamic_plan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window import window_plan


@pytest.mark.parametrize("seed", range(40))
def test_random_maps(seed):
    case = two_layouts(seed)
    plan, mask = case.plan(), case.mask()
    assert (plan.q_len, plan.k_len) == (case.queries.grid.tokens, case.keys.grid.tokens)
    assert torch.equal(plan.to_mask(case.heads), mask)
    assert plan.density == pytest.approx(mask.double().mean().item(), abs=1e-9)
    listed = plan.ends[..., 2].double().mean((0, 2))
    listed = listed.mean() if case.head_set is None else listed[case.head_set].mean()
    room = len(plan.q_rows) * plan.block**2 / (plan.q_len * plan.k_len)
    assert plan.work == pytest.approx(listed.item() * room)
    assert plan.work >= plan.density - 1e-9
    assert plan.block >= int(max(case.queries.block_rows.max(), case.keys.block_rows.max()))


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_dynamic_plans(seed):
    case = two_layouts(seed)
    plan = dynamic_plan(case.queries, case.full, key_layout=case.keys)
    want = plan_from_block_map(case.queries, case.full, key_layout=case.keys)
    assert torch.equal(plan.ends, want.ends)
    heads = case.full.shape[1]
    assert torch.equal(plan.to_mask(heads), want.to_mask(heads))
    assert float(plan.device_density) == pytest.approx(want.to_mask(heads).double().mean().item(), rel=1e-5)


def test_dynamic_maps_of_another_shape_are_refused():
    queries, keys = Layout(Grid(1, 4, 4), (1, 2, 2)), Layout(Grid(3, 4, 4), (1, 2, 2))
    with pytest.raises(ValueError, match=r"\(P, G, 4, 12\) bool"):
        dynamic_plan(queries, torch.ones(1, 1, 4, 4, dtype=torch.bool), key_layout=keys)


def test_dense():
    queries, keys = Layout(Grid(1, 5, 4, text=3), (1, 2, 2), 16), Layout(Grid(3, 5, 4), (2, 2, 2), 16)
    plan = dense_plan(queries, key_layout=keys)
    assert plan.is_dense
    assert bool(plan.to_mask(2).all())
    assert plan.to_mask(1).shape[2:] == (23, 60)


WHOLE = Grid(12, 5, 6)
CHUNKS = [
    # unit, window, stride, tile of the keys, tile of the queries, (offset, shape) of queries and keys
    ("token", (5, 3, 4), (1, 1, 1), (3, 2, 3), (3, 2, 3), ((9, 0, 0), (3, 5, 6)), ((0, 0, 0), (12, 5, 6))),
    ("token", (4, 3, 9), (2, 1, 3), (4, 3, 2), (1, 3, 3), ((3, 0, 0), (3, 5, 6)), ((0, 0, 0), (12, 5, 6))),
    ("token", (5, 3, 3), (1, 1, 1), (3, 2, 3), (2, 2, 2), ((4, 1, 2), (3, 3, 4)), ((0, 0, 0), (12, 5, 6))),
    ("token", (7, 3, 3), (1, 1, 1), (3, 2, 3), (2, 2, 2), ((8, 0, 0), (4, 5, 6)), ((4, 0, 0), (5, 5, 6))),
    ("tile", (2, 1, 1), (1, 1, 1), (3, 2, 3), (3, 2, 3), ((9, 0, 0), (3, 5, 6)), ((0, 0, 0), (12, 5, 6))),
    ("tile", (2, 2, 1), (1, 1, 1), (3, 2, 3), (1, 2, 3), ((4, 0, 0), (2, 5, 6)), ((0, 0, 0), (12, 5, 6))),
    ("tile", (3, 9, 1), (1, 1, 1), (2, 2, 3), (2, 4, 3), ((6, 0, 3), (4, 2, 3)), ((4, 0, 0), (6, 5, 6))),
]


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 20), (3, 5)])
@pytest.mark.parametrize(("unit", "window", "stride", "tile", "q_tile", "q_part", "k_part"), CHUNKS)
def test_windows_of_parts_are_parts_of_the_window(unit, window, stride, tile, q_tile, q_part, k_part, text):
    """Rows and columns of the mask over the whole grid, for the tokens that the parts hold."""
    whole = naive_mask(Case("whole", WHOLE, tile, (window,), unit=unit, stride=stride, heads=1))[0]

    def part(offset, shape, tile, text, first):
        axes = (range(at, at + n) for at, n in zip(offset, shape, strict=True))
        raster = [(t * WHOLE.h + h) * WHOLE.w + w for t, h, w in itertools.product(*axes)]
        layout = Layout(Grid(*shape, text, first), tile, 16)
        is_text = torch.zeros(layout.grid.tokens, dtype=torch.bool)
        is_text[:text] = True
        where = torch.zeros(layout.grid.tokens, dtype=torch.long)
        if not first:
            is_text = is_text.flip(0)
        where[~is_text] = torch.tensor(raster)
        return layout, where[layout.permutation], is_text[layout.permutation]

    queries, q_at, q_text = part(*q_part, q_tile, text[0], True)
    keys, k_at, k_text = part(*k_part, tile, text[1], False)
    plan = window_plan(
        queries, [window], unit=unit, stride=stride, key_layout=keys, query_offset=q_part[0], key_offset=k_part[0],
        shape=WHOLE.shape,
    )  # fmt: skip
    want = whole[q_at][:, k_at] | q_text[:, None] | k_text
    assert torch.equal(plan.to_mask(1)[0, 0], want)
    assert plan.density == pytest.approx(want.double().mean().item(), abs=1e-9)
    if unit == "token" and not text[1]:
        assert bool((plan.ends[0, 0, :, 2] > plan.ends[0, 0, :, 1]).any()), "no partial blocks"


def test_parts_outside_the_whole_grid_are_refused():
    queries, keys = Layout(Grid(3, 4, 4), (3, 2, 2)), Layout(Grid(12, 4, 4), (3, 2, 2))
    for given in ({"query_offset": (10, 0, 0)}, {"query_offset": (-1, 0, 0)}, {"shape": (11, 4, 4)}):
        with pytest.raises(ValueError, match="do not lie in the grid"):
            window_plan(queries, [(3, 3, 3)], unit="token", key_layout=keys, **given)
    with pytest.raises(ValueError, match="every block in one tile"):
        window_plan(queries, [(1, 1, 1)], unit="tile", key_layout=keys, query_offset=(8, 0, 0))


@pytest.mark.parametrize("causal", [False, True])
def test_axes_of_the_last_frames(causal):
    """Tables of the last three of eight frames, over all eight."""
    whole = dilated_layout(Grid(8, 5, 6), (4, 3, 3), (1, 2, 1), 64)
    axes = [axis_windows(8, 4, causal=causal), axis_windows(5, 2, dilation=2), axis_windows(6, 3)]
    want = axes_plan(whole, axes).to_mask(1)[0, 0][whole.inverse][:, whole.inverse]  # over raster tokens
    queries = dilated_layout(Grid(3, 5, 6), (2, 3, 3), (1, 2, 1), 32)
    plan = axes_plan(queries, [(axes[0][0][5:], axes[0][1][5:]), *axes[1:]], key_layout=whole)
    got = plan.to_mask(1)[0, 0][queries.inverse][:, whole.inverse]
    assert torch.equal(got, want[-90:])
    assert plan.density == pytest.approx(got.double().mean().item(), abs=1e-9)


def test_density_counts_what_intervals_leave_of_partial_blocks_alone():
    """Full blocks that their rows' intervals do not hold, and keys in the intervals that no list has."""
    layout = Layout(Grid(1, 4, 8), (1, 2, 4), 16)
    full = torch.eye(4, dtype=torch.bool)[None, None]
    partial = full.roll(1, -1)
    intervals = torch.zeros(1, 6, 32, dtype=torch.int32)  # empty: partial blocks show nothing
    plan = plan_from_block_map(layout, full, partial, intervals=intervals)
    assert plan.density == plan.to_mask(1).double().mean() == 0.25
    intervals[:, 1::2] = 99  # everything, so also blocks that are not listed
    plan = plan_from_block_map(layout, full, partial, intervals=intervals)
    assert plan.density == plan.to_mask(1).double().mean() == 0.5


def test_maps_and_intervals_of_another_shape_are_refused():
    queries, keys = Layout(Grid(1, 4, 4), (1, 2, 2)), Layout(Grid(3, 4, 4), (1, 2, 2))
    maps = torch.ones(1, 2, 4, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(P, G, 4, 12\) for these layouts, got \(1, 2, 12, 4\)"):
        plan_from_block_map(queries, maps.transpose(2, 3), key_layout=keys)
    for shape in ((1, 6, 16), (2, 6, 48), (2, 3, 16)):
        with pytest.raises(ValueError, match=r"intervals must be \(G, 6, Sq\) = \(2, 6, 16\)"):
            plan_from_block_map(queries, ~maps, maps, key_layout=keys, intervals=torch.zeros(shape, dtype=torch.int32))
    for head_set in ([0, 2], [-1, 0], [[0, 1]]):
        with pytest.raises(ValueError, match="below G = 2"):
            plan_from_block_map(queries, maps, key_layout=keys, head_set=torch.tensor(head_set))


def test_all_heads_may_share_one_of_two_sets():
    layout = Layout(Grid(1, 4, 4), (1, 2, 2))
    maps = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = plan_from_block_map(layout, maps, head_set=torch.tensor([1, 1, 1]))
    assert torch.equal(plan.to_mask(3), plan_from_block_map(layout, maps[:, 1:]).to_mask(3))
    assert plan.density == plan.to_mask(3).double().mean()


@pytest.mark.parametrize("row", [0, 5, 13, slice(None)])
@pytest.mark.parametrize(
    ("end", "value"),
    [
        (1, 4),
        (3, 4),
        (3, 5),
        (5, 6),
        (5, 7),
        (2, 1),
        (4, 3),
        (0, 1),
        (0, 3),
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 1),
        (5, 9),
        (4, 0),
        (2, 0),
        (3, 9),
    ],
)
def test_density_where_intervals_are_not_the_maps(row, end, value):
    """A row's interval, or all of a block's, cut through full blocks, or hold keys of blocks that are not listed."""
    layout = Layout(Grid(4, 6, 8), (2, 2, 4), 16)
    plan = window_plan(layout, [(3, 3, 5)], unit="token")
    full, partial = (torch.zeros(1, 1, layout.blocks, layout.blocks, dtype=torch.bool) for _ in range(2))
    for i in range(layout.blocks):
        _, ragged, listed = plan.ends[0, 0, i].tolist()
        full[0, 0, i, plan.index[0, 0, i, :ragged].long()] = True
        partial[0, 0, i, plan.index[0, 0, i, ragged:listed].long()] = True
    intervals = plan.intervals.clone()
    for block in range(layout.blocks):
        start, rows = int(layout.block_start[block]), int(layout.block_rows[block])
        intervals[0, end, start : start + rows][row] = value
    changed = plan_from_block_map(layout, full, partial, intervals=intervals)
    assert changed.density == pytest.approx(changed.to_mask(1).double().mean().item(), abs=1e-9)


def test_plans_move_with_all_their_tensors():
    plan = two_layouts(4).plan()
    moved = plan.to("meta")
    tensors = [name for name, value in vars(plan).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 10
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.q_len, moved.k_len, moved.block, moved.guard_bits) == (
        plan.q_len,
        plan.k_len,
        plan.block,
        plan.guard_bits,
    )
    assert moved._cache is not plan._cache


def test_windows_and_strides_below_one_are_refused():
    layout = Layout(Grid(3, 4, 4), (1, 2, 2))
    for windows, stride in (
        ([(1, 0, 3)], (1, 1, 1)),
        ([(1, 1, 1), (0, 1, 1)], (1, 1, 1)),
        ([], (1, 1, 1)),
        ([(1, 1, 1)], (1, 0, 2)),
    ):
        with pytest.raises(ValueError, match="must be triples of at least 1"):
            window_plan(layout, windows, unit="tile", stride=stride)
