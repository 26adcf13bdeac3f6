"""Grids and layouts: every token exactly once, tiles contiguous, border tiles ragged."""

import weakref
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.kernels.plans.dilated import DilatedLayout, dilated_layout
from tilewise.kernels.plans.layout import MAX_CACHED, Grid, Layout, cached_layout

sizes = st.integers(1, 12)
grids = st.builds(
    Grid, t=st.integers(1, 7), h=sizes, w=sizes, text=st.sampled_from([0, 0, 5, 40]), text_first=st.booleans()
)
layouts = st.builds(
    Layout, grids, st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), st.sampled_from([16, 32, 128])
)


@given(layouts)
@settings(max_examples=60, deadline=None)
def test_permutation_and_inverse_round_trip(layout):
    x = torch.arange(layout.grid.tokens)
    assert torch.equal(x[layout.permutation][layout.inverse], x)
    assert torch.equal(torch.sort(layout.permutation).values, x)


@given(layouts)
@settings(max_examples=60, deadline=None)
def test_blocks_cover_the_sequence_once_and_stay_in_one_tile(layout):
    start, rows = layout.block_start, layout.block_rows
    assert int(rows.sum()) == layout.grid.tokens  # no padding
    assert torch.equal(start, torch.cumsum(rows, 0) - rows)
    assert int(rows.min()) >= 1
    assert int(rows.max()) <= layout.max_block_rows
    tile = torch.tensor(layout.tile)
    for i in range(layout.blocks):
        at = layout.coords[:, start[i] : start[i] + rows[i]]
        if layout.is_text[i]:
            assert bool((at == -1).all())
        else:
            assert bool(((at // tile[:, None]) == layout.block_tile[i][:, None]).all())


@given(layouts)
@settings(max_examples=30, deadline=None)
def test_text_keeps_its_end_of_the_sequence(layout):
    grid = layout.grid
    if grid.text_first:
        assert torch.equal(layout.permutation[: grid.text], torch.arange(grid.text))
    elif grid.text:
        assert torch.equal(layout.permutation[-grid.text :], torch.arange(grid.video, grid.tokens))
    assert int(layout.block_rows[layout.is_text].sum()) == grid.text


@pytest.mark.parametrize("shape", [(21, 30, 52), (21, 45, 80), (33, 45, 80), (9, 16, 16), (1, 30, 52), (1, 1, 7)])
def test_grids_that_users_have(shape):
    layout = Layout(Grid(*shape), (6, 8, 8))
    assert int(layout.block_rows.sum()) == layout.grid.tokens
    assert layout.tiles == tuple(-(-n // min(s, n)) for n, s in zip(shape, (6, 8, 8), strict=True))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Grid(0, 4, 4)
    with pytest.raises(ValueError, match="tile must be three"):
        Layout(Grid(2, 4, 4), (1, 0, 4))
    with pytest.raises(ValueError, match="16, 32, 64 or 128"):
        Layout(Grid(2, 4, 4), (1, 2, 4), 100)


def test_layouts_are_cached():
    assert cached_layout(Grid(2, 4, 4), (1, 2, 2)) is cached_layout(Grid(2, 4, 4), (1, 2, 2))


@dataclass(frozen=True)
class ReversedLayout(Layout):
    """A user's own layout: each tile's tokens in reverse, with a field of its own."""

    note: str = ""

    @cached_property
    def permutation(self):
        order = super().permutation
        return torch.cat([order[s : s + r].flip(0) for s, r in zip(self.block_start, self.block_rows, strict=True)])


@given(layouts, st.sampled_from([0, 1, 5, 130]))
@settings(max_examples=30, deadline=None)
def test_with_text_is_the_layout_of_the_other_grid(layout, text):
    grid = layout.grid
    other = layout.with_text(text)
    assert other == Layout(Grid(*grid.shape, text, grid.text_first), layout.tile, layout.max_block_rows)
    assert other.with_text(grid.text) == layout
    assert layout.with_text(grid.text) is layout


@pytest.mark.parametrize(
    "layout",
    [
        dilated_layout(Grid(3, 6, 7, 5), (2, 3, 3), (1, 2, 3), 32),
        ReversedLayout(Grid(3, 6, 7, 5, True), (2, 3, 3), 16, "mine"),
    ],
)
def test_with_text_keeps_the_class_and_its_fields(layout):
    other = layout.with_text(21)
    assert type(other) is type(layout)
    assert other.grid == Grid(3, 6, 7, 21, layout.grid.text_first)
    fields = {name: value for name, value in vars(layout).items() if name in layout.__dataclass_fields__}
    assert {**fields, "grid": other.grid} == {name: getattr(other, name) for name in fields}
    video = layout.with_text(0).permutation
    first = 21 if layout.grid.text_first else 0
    assert torch.equal(other.permutation[first : first + layout.grid.video] - first, video)
    assert not torch.equal(video, Layout(Grid(3, 6, 7), layout.tile, layout.max_block_rows).permutation)


def test_with_text_computes_a_layout_once():
    layout = DilatedLayout(Grid(2, 4, 4, 3), (1, 2, 2), 128, (1, 2, 2))
    assert layout.with_text(9) is layout.with_text(9)
    with pytest.raises(ValueError, match="text at least 0"):
        layout.with_text(-1)


def test_layouts_keep_what_is_derived_from_them_and_no_module_does():
    layout = cached_layout(Grid(2, 4, 4, 3), (1, 2, 2))
    table = layout.block_table(torch.device("cpu"))
    assert layout.block_table(torch.device("cpu")) is table
    assert cached_layout(Grid(2, 4, 4, 3), (1, 2, 2)).block_table(torch.device("cpu")) is table
    held = [
        weakref.ref(x)
        for x in (layout, table[0], layout.with_text(9), dilated_layout(layout.grid, (1, 2, 2), (1, 2, 2)))
    ]
    del layout, table
    assert [ref() for ref in held] == [None] * 4


def test_a_layout_forgets_the_oldest_of_many():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2))
    made = []
    for n in range(100):
        layout.with_text(n)
        assert layout.cached(n, lambda n=n: made.append(n) or n + 1) == n + 1
    assert layout.cached(99, list) == 100
    assert made == list(range(100))
    assert len(layout._derived) == len(layout._of_text) == MAX_CACHED
    layout.cached(0, lambda: made.append("again") or 1)
    assert made[-1] == "again"


@pytest.mark.parametrize("make", [Layout, lambda *args: DilatedLayout(*args, dilation=(1, 2, 1))])
def test_tables_are_on_the_cpu_whatever_the_default_device_is(make):
    with torch.device("meta"):
        layout = make(Grid(2, 5, 4, 3), (1, 2, 2), 16)
        tables = layout.permutation, layout.inverse, layout.coords, layout.block_start, layout.block_tile
    assert [x.device.type for x in tables] == ["cpu"] * 5
