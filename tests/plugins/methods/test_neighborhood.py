"""Neighborhood attention against a mask written out token by token."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
import tiny_wan
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tilewise
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.dilated import axis_order, axis_windows
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.neighborhood import Neighborhood

CASES = {
    "plain": (Grid(5, 9, 7), Neighborhood(window=(3, 4, 5))),
    "one frame": (Grid(1, 12, 5), Neighborhood(window=(3, 5, 2))),
    "strides": (Grid(4, 10, 11), Neighborhood(window=(2, 5, 6), stride=(2, 3, 4))),
    "dilated": (Grid(4, 11, 9), Neighborhood(window=(2, 3, 3), dilation=(1, 2, 3))),
    "dilation larger than an axis": (Grid(3, 4, 9), Neighborhood(window=(3, 3, 3), dilation=(5, 2, 2))),
    "dilated and strided": (Grid(5, 8, 13), Neighborhood(window=(2, 3, 4), stride=(2, 1, 3), dilation=(2, 2, 2))),
    "causal": (Grid(7, 5, 6), Neighborhood(window=(3, 3, 3), causal=True)),
    "causal, strided, dilated": (
        Grid(9, 4, 4),
        Neighborhood(window=(3, 2, 2), stride=(2, 1, 1), dilation=(2, 1, 2), causal=True),
    ),
    "causal on h": (Grid(3, 8, 7), Neighborhood(window=(2, 4, 3), causal=(False, True, False))),
    "causal on every axis": (Grid(5, 7, 6), Neighborhood(window=(3, 4, 2), causal=(True, True, True))),
    "causal on h and w, strided": (
        Grid(3, 9, 11),
        Neighborhood(window=(3, 4, 5), stride=(2, 3, 5), causal=(False, True, True)),
    ),
    "causal on every axis, strided, dilated": (
        Grid(5, 11, 13),
        Neighborhood(window=(2, 3, 4), stride=(1, 2, 3), dilation=(2, 3, 2), causal=(True, True, True)),
    ),
    "causal on w, dilation larger than the axis": (
        Grid(3, 6, 4),
        Neighborhood(window=(2, 3, 3), stride=(1, 1, 3), dilation=(1, 2, 5), causal=(False, False, True)),
    ),
    "causal on h, text": (
        Grid(2, 7, 5, text=4, text_first=True),
        Neighborhood(window=(2, 3, 2), causal=(False, True, False)),
    ),
    "causal, one frame": (Grid(1, 6, 6), Neighborhood(window=(4, 3, 3), stride=(3, 1, 1), causal=True)),
    "larger than the grid": (Grid(2, 3, 4), Neighborhood(window=(9, 9, 9), stride=(4, 4, 4))),
    "text": (Grid(3, 6, 5, text=4), Neighborhood(window=(1, 3, 3), causal=True)),
}


def causal_axes(method):
    return (method.causal, False, False) if isinstance(method.causal, bool) else method.causal


def sees(q, k, length, window, stride, dilation, causal):
    """Whether coordinate q of one axis sees k: straight from the definition, in the residue class of q."""
    if q % dilation != k % dilation:
        return False
    size, i, j = len(range(q % dilation, length, dilation)), q // dilation, k // dilation
    first = i // stride * stride
    if causal:
        last = min(first + stride - 1, size - 1)
        return max(0, last - window + 1) <= j <= i
    window = min(window, size)
    middle = min(first + stride // 2, size - 1)
    start = min(max(middle - window // 2, 0), size - window)
    return start <= j < start + window


def naive_mask(grid, method):
    axes = []
    for axis, length in enumerate(grid.shape):
        rule = (length, method.window[axis], method.stride[axis], method.dilation[axis], causal_axes(method)[axis])
        axes.append(torch.tensor([[sees(q, k, *rule) for k in range(length)] for q in range(length)]))
    video = torch.einsum("ab,cd,ef->acebdf", *(a.float() for a in axes)).reshape(grid.video, grid.video) > 0
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    at = grid.text if grid.text_first else 0
    mask[at : at + grid.video, at : at + grid.video] = video
    return mask


@pytest.mark.parametrize(("grid", "method"), CASES.values(), ids=CASES)
def test_mask_is_the_naive_one(grid, method):
    layout = method.layout(grid)
    assert torch.equal(layout.permutation.sort().values, torch.arange(grid.tokens))
    assert torch.equal(layout.permutation[layout.inverse], torch.arange(grid.tokens))
    plan = method.plan(layout, 3, torch.device("cpu"))
    mask = naive_mask(grid, method)
    assert torch.equal(plan.to_mask(3)[0, 2][layout.inverse][:, layout.inverse], mask)
    assert plan.density == pytest.approx(float(mask.float().mean()))


def natten_sees(q, k, length, window, stride, dilation, causal):
    """NATTEN's rule for one axis (its reference kernels: window start and end of a query within its dilation group)."""
    group = q % dilation
    if k % dilation != group:
        return False
    size = length // dilation + 1 - (group + dilation - length % dilation) // dilation
    i, j, left, right = q // dilation, k // dilation, window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(i // stride * stride + stride - 1, size - 1)
        return max(leader - left - right, 0) <= j < min(i + 1, size)
    leader = min(i // stride * stride + stride // 2, size - 1)
    start = max(leader - left, 0) + (leader + right >= size) * (size - right - leader - 1)
    return start <= j < start + window


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_natten_defines(seed):
    """Random windows, strides, dilations and causal axes of sizes for NATTEN: stride ≤ window, window · dilation ≤ axis."""
    random = Random(seed)
    shape, rules = [], []
    for _ in range(3):
        dilation, window = random.randint(1, 3), random.randint(2, 4)
        length = window * dilation + random.randint(0, 3)
        rules.append((length, window, random.randint(1, window), dilation, random.random() < 0.6))
        shape.append(length)
    axes = [torch.tensor([[natten_sees(q, k, *r) for k in range(r[0])] for q in range(r[0])]).float() for r in rules]
    tokens = math.prod(shape)
    want = torch.einsum("ab,cd,ef->acebdf", *axes).reshape(tokens, tokens) > 0
    _, window, stride, dilation, causal = zip(*rules, strict=True)
    method = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    layout = method.layout(Grid(*shape))
    mask = method.plan(layout, 1, torch.device("cpu")).to_mask(1)[0, 0]
    assert torch.equal(mask[layout.inverse][:, layout.inverse], want)


@pytest.mark.parametrize(
    "name",
    [
        "dilated and strided", "causal, strided, dilated", "text", "causal on every axis, strided, dilated",
        "causal on h, text",
    ],
)  # fmt: skip
def test_attention(name):
    grid, method = CASES[name]
    layout = method.layout(grid)
    plan = method.plan(layout, 2, torch.device("cpu"))
    q, k, v = (torch.randn(2, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    wanted, _ = masked_attention(q, k, v, naive_mask(grid, method))
    order = layout.permutation
    found = block_sparse_attention(q[:, order], k[:, order], v[:, order], plan)[:, layout.inverse]
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "strides", "dilated and strided", "causal on every axis, strided, dilated"])
@pytest.mark.slow
def test_flex_attention_agrees(name):
    """The rule written as FlexAttention's mask_mod, by arithmetic on raster positions."""
    grid, method = CASES[name]
    _, h, w = grid.shape

    def axis(q, k, number):
        length, causal = grid.shape[number], causal_axes(method)[number]
        window, stride, dilation = method.window[number], method.stride[number], method.dilation[number]
        i, j = q // dilation, k // dilation
        size = (length - 1 - q % dilation) // dilation + 1  # of the residue class of q
        first = i // stride * stride
        if causal:
            last = torch.minimum(first + stride - 1, size - 1)
            seen = (j > last - window) & (j <= i)
        else:
            middle = torch.minimum(first + stride // 2, size - 1)
            start = (middle - window // 2).clamp(min=0)
            start = torch.minimum(start, (size - window).clamp(min=0))
            seen = (j >= start) & (j < start + window)
        return seen & (q % dilation == k % dilation)

    def mask_mod(batch, head, q, k):
        return axis(q // (h * w), k // (h * w), 0) & axis(q // w % h, k // w % h, 1) & axis(q % w, k % w, 2)

    q, k, v = (torch.randn(1, grid.tokens, 2, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    mask = create_block_mask(mask_mod, None, None, grid.tokens, grid.tokens, device="cpu")
    wanted = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
    layout = method.layout(grid)
    order = layout.permutation
    plan = method.plan(layout, 2, torch.device("cpu"))
    found = block_sparse_attention(q[:, order], k[:, order], v[:, order], plan)[:, layout.inverse]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_dilation_reaches_all_layers_of_a_model():
    """Two layers in the dilated order, entry and exit included: the whole axis dilated is block-diagonal by residues."""
    model = tiny_wan.tiny_transformer()
    x = torch.randn(1, 4, 2, 16, 20, generator=torch.Generator().manual_seed(0))  # grid 2×8×10
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[..., 6:8, :] += 2.0  # row 3
    tilewise.patch(model, Neighborhood(window=(9, 99, 99), dilation=(1, 2, 1)), steps=(0, 1), strict=True)
    with torch.no_grad():
        a, b = (model(y, torch.tensor([400.0]), text).sample for y in (x, other))
    moved = (a != b).any(1)[0].any(0).any(1).unflatten(0, (8, 2)).any(1)  # (8,)
    assert moved.tolist() == [False, True] * 4


def test_axis_tables_never_fall():
    for length, window, stride, dilation, causal in [(13, 4, 1, 3, False), (13, 4, 3, 2, True), (5, 9, 2, 7, False)]:
        lo, hi = axis_windows(length, window, stride, dilation, causal)
        assert (lo.diff() >= 0).all()
        assert (hi.diff() >= 0).all()
        assert (lo < hi).all()
        assert sorted(axis_order(length, dilation).tolist()) == list(range(length))


def test_bad_options():
    with pytest.raises(ConfigError, match="window must be three"):
        Neighborhood(window=(3, 3))
    with pytest.raises(ConfigError, match="dilation must be three"):
        Neighborhood(dilation=(1, 0, 1))
    with pytest.raises(ConfigError, match="cannot have a stride of 4"):
        Neighborhood(window=(3, 3, 3), stride=(4, 1, 1), causal=True)
    with pytest.raises(ConfigError, match="causal window of 3 on w cannot have a stride of 4"):
        Neighborhood(window=(3, 3, 3), stride=(1, 4, 4), causal=(True, False, True))
    for causal in (1, "ttt", (True, False), (1, 0, 0), None, [True, True, "w"]):
        with pytest.raises(ConfigError, match="causal must be"):
            Neighborhood(causal=causal)
    with pytest.raises(ConfigError, match="text tokens"):
        Neighborhood(dilation=(1, 2, 2)).layout(Grid(2, 4, 4, text=3))
    with pytest.raises(ValueError, match="at least as long as its stride"):
        axis_windows(8, 2, 3, causal=True)


def test_round_trip():
    for causal in (True, [False, True, True]):
        config = Config(Neighborhood(window=[3, 4, 5], causal=causal))
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.method.causal == (False, True, True)


@pytest.mark.parametrize("causal", [True, (False, True, True)])
def test_nothing_behind_a_query_moves_it(causal):
    """Through a patched model, one layer: a token moves what lies at or behind it on every causal axis, and nothing else."""
    model = tiny_wan.tiny_transformer(num_layers=1)
    x = torch.randn(1, 4, 3, 12, 14, generator=torch.Generator().manual_seed(0))  # grid 3×6×7
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, :, 1, 4:6, 6:8] += 2.0  # the token at (1, 2, 3)
    with (
        tilewise.patched(model, Neighborhood(window=(9, 99, 99), causal=causal), steps=(0, 1), strict=True),
        torch.no_grad(),
    ):
        a, b = (model(y, torch.tensor([400.0]), text).sample for y in (x, other))
    moved = (a != b)[0].any(0).unflatten(1, (6, 2)).unflatten(3, (7, 2)).any(4).any(2)
    at = torch.meshgrid(*(torch.arange(n) for n in (3, 6, 7)), indexing="ij")
    want = torch.ones(3, 6, 7, dtype=torch.bool)
    for axis, on in enumerate((True, False, False) if causal is True else causal):
        want &= (at[axis] >= (1, 2, 3)[axis]) | (not on)
    assert torch.equal(moved, want)
