"""Dilated, strided and causal windows of one axis: each coordinate sees what the definition says, by its own residue class."""

import itertools

import pytest
import torch

from tilewise.kernels.plans.dilated import DilatedLayout, axes_plan, axis_order, axis_windows
from tilewise.kernels.plans.layout import Grid

SIZES = [
    (length, window, stride, dilation, causal)
    for length, window, stride, dilation, causal in itertools.product(
        (1, 2, 5, 9), (1, 2, 3, 4, 12), (1, 2, 3), (1, 2, 3, 11), (False, True)
    )
    if not causal or stride <= min(window, length)
]


def sees(i: int, j: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """The definition in real coordinates: a window of the query's own residue class."""
    if i % dilation != j % dilation:
        return False
    size = len(range(i % dilation, length, dilation))
    a, b = i // dilation, j // dilation
    if causal:
        leader = min(a // stride * stride + stride - 1, size - 1)
        return max(0, leader - window + 1) <= b <= a
    window = min(window, size)
    leader = min(a // stride * stride + stride // 2, size - 1)
    start = min(max(leader - window // 2, 0), size - window)
    return start <= b < start + window


@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_an_axis(causal):
    for length, window, stride, dilation, _ in (s for s in SIZES if s[-1] == causal):
        real = axis_order(length, dilation)
        assert sorted(real.tolist()) == list(range(length))
        lo, hi = axis_windows(length, window, stride, dilation, causal)
        assert bool((lo.diff() >= 0).all()), "a block's first and last row must bound what its rows see"
        assert bool((hi.diff() >= 0).all())
        for c, (first, last) in enumerate(zip(lo.tolist(), hi.tolist(), strict=True)):
            i = int(real[c])
            want = {j for j in range(length) if sees(i, j, length, window, stride, dilation, causal)}
            assert set(real[first:last].tolist()) == want, (length, window, stride, dilation, i)


def test_sizes_and_causal_windows_shorter_than_their_stride_are_refused():
    for bad in ((0, 1, 1, 1), (4, 0, 1, 1), (4, 1, 0, 1), (4, 1, 1, 0)):
        with pytest.raises(ValueError, match="sizes must be at least 1"):
            axis_windows(*bad)
    for length, window, stride in ((4, 1, 2), (1, 5, 2)):
        with pytest.raises(ValueError, match="at least as long as its stride"):
            axis_windows(length, window, stride, causal=True)
    lo, hi = axis_windows(4, 2, 2, causal=True)
    assert (lo.tolist(), hi.tolist()) == ([0, 0, 2, 2], [1, 2, 3, 4])


@pytest.mark.parametrize(("text", "first"), [(0, False), (5, False), (5, True)])
def test_plans_over_a_dilated_layout(text, first):
    grid = Grid(4, 5, 7, text, first)
    layout = DilatedLayout(grid, (2, 3, 3), 32, (2, 1, 3))
    plan = axes_plan(
        layout, [axis_windows(4, 2, dilation=2, causal=True), axis_windows(5, 3), axis_windows(7, 2, dilation=3)]
    )
    mask = plan.to_mask(1)[0, 0][layout.inverse][:, layout.inverse]
    axes = [torch.tensor([[sees(i, j, n, w, 1, d, c) for j in range(n)] for i in range(n)])
            for n, w, d, c in ((4, 2, 2, True), (5, 3, 1, False), (7, 2, 3, False))]  # fmt: skip
    want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    video = slice(text if first else 0, (text if first else 0) + grid.video)
    want[video, video] = (
        torch.einsum("ab,cd,ef->acebdf", *(x.double() for x in axes)).bool().reshape(grid.video, grid.video)
    )
    assert torch.equal(mask, want)
    assert plan.density == pytest.approx(want.double().mean().item(), abs=1e-9)
