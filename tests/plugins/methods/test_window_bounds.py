"""A choice within a window: the token pairs that are counted, and a key for every query."""

import dataclasses
import os

import pytest
import torch
from plan_cases import Case
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise.kernels.attention.dispatch import block_sparse_attention
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.methods.dynamic import windowed_selection

WINDOWS = {
    "small": tilewise.Neighborhood(window=(3, 3, 3)),
    "one token": tilewise.Neighborhood(window=(1, 1, 1)),
    "stride longer than the window": tilewise.Neighborhood(window=(1, 1, 2), stride=(1, 5, 7)),
    "strides across tiles": tilewise.Neighborhood(window=(2, 4, 3), stride=(2, 3, 3)),
    "causal": tilewise.Neighborhood(window=(3, 3, 4), stride=(2, 1, 1), causal=True),
    "training size": tilewise.Inward(native=(4, 4), temperature=False),
    "tiles": tilewise.STA(window=(1, 2, 1)),
}


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("windows", [((3, 7, 5),), ((1, 9, 4), (4, 3, 12))])
def test_pairs_are_counted_some_rows_at_a_time(monkeypatch, windows):
    monkeypatch.setattr(windowed_selection, "CHUNK", 300)
    case = Case("window", Grid(6, 14, 15, text=9), (3, 5, 6), windows, unit="token", block=128)
    plan = case.plan()
    seen = plan.to_mask(2)[0, : plan.sets].double()
    of_block = torch.nn.functional.one_hot(torch.repeat_interleave(plan.q_rows.long())).double()  # (S, N)
    pairs = torch.einsum("gqk,qi,kj->gij", seen, of_block, of_block)
    listed = torch.arange(plan.index.shape[-1]) < plan.ends[0, ..., 2:]
    want = torch.where(listed, pairs.gather(-1, plan.index[0].long()), 0)
    with LargestTensor() as largest:
        bounds = windowed_selection.bounds_of(plan)
    assert torch.equal(bounds.pairs.double(), want)
    assert largest.numel < plan.q_len * plan.index.shape[-1] / 2


RULES = {
    "density": ("draft", {"density": 0.02}),
    "recall": ("draft", {"recall": 0.2, "safety": 1.0, "always": ("first-frame",)}),
    "shared": ("draft", {"density": 0.02, "select": "shared", "compensate": False}),
    "top k": ("draft", {"density": 0.02, "select": "topk", "always": ("self",)}),
    "antidiagonals": ("xattention", {"density": 0.02, "select": "head", "compensate": False}),
}


@pytest.mark.parametrize(
    ("within", "rule"),
    [
        pytest.param("small", "density", marks=pytest.mark.interpreted),
        *((within, "density") for within in list(WINDOWS)[1:]),
        *(("small", rule) for rule in list(RULES)[1:]),
    ],
)
def test_every_query_sees_a_key(within, rule):
    """Whatever is chosen; nothing outside the window is seen, and what is compensated is what is not listed."""
    grid, (name, options) = Grid(2, 7, 9), RULES[rule]
    method = make_method(name, {"always": (), "tile": (1, 4, 4), "within": WINDOWS[within], "min_tokens": 0} | options)
    layout = method.layout(grid)
    generator = torch.Generator().manual_seed(0)
    batch, H = (1, 2) if os.environ.get("TRITON_INTERPRET") == "1" else (2, 4)  # there it is slow
    q, k, v = (torch.randn(batch, grid.tokens, heads, 16, generator=generator) for heads in (H, H // 2, H // 2))
    found = method.plan_call(layout, q, k, v, 0.25, {}, 0)
    mask = found.plan.to_mask(H)
    window = dataclasses.replace(WINDOWS[within], tile=(1, 4, 4)) if within == "tiles" else WINDOWS[within]
    bounds = window.plan(layout, H, torch.device("cpu")).to_mask(H)
    assert mask.any(-1).all()
    assert not (mask & ~bounds).any()
    assert float(found.plan.device_density) == pytest.approx(float(mask.double().mean()), rel=1e-5)
    out, lse = block_sparse_attention(q, k, v, found.plan, scale=0.25, return_lse=True)
    want, want_lse = masked_attention(q, k, v, mask, 0.25)
    torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-4, atol=1e-5)
    if found.compensation is not None:
        of_block = torch.repeat_interleave(layout.block_rows)
        stood_for = (found.compensation.bias > -torch.inf)[:, :, of_block][..., of_block]
        assert not (stood_for & (mask | ~bounds)).any()


@pytest.mark.parametrize("windows", [((3, 7, 5),), ((1, 9, 4), (4, 3, 12)), ((1, 1, 1), (1, 2, 2))])
@pytest.mark.parametrize(("stride", "text"), [((1, 1, 1), 0), ((2, 3, 4), 9), ((6, 14, 15), 0)])
def test_only_what_is_needed_is_added_to_a_choice(windows, stride, text):
    case = Case("window", Grid(4, 7, 8, text=text), (2, 3, 3), windows, unit="token", block=32, stride=stride)
    layout, plan = case.layout(), case.plan()
    window = plan.to_mask(2)[0]
    of_block = torch.repeat_interleave(layout.block_rows)
    N = layout.blocks
    kept = torch.rand(2, 2, N, N, generator=torch.Generator().manual_seed(0)) < 0.15
    kept[:, :, 0] = False
    mask = windowed_selection.plan_within(windowed_selection.bounds_of(plan), kept).to_mask(2)
    chosen = kept[:, :, of_block][..., of_block] & window
    assert (mask | ~chosen).all()
    assert not (mask & ~window).any()
    assert mask.any(-1).all()
    in_block = torch.nn.functional.one_hot(of_block).double()
    blind = torch.einsum("hsk,kj->hsj", window.double(), in_block) == 0  # rows that a key block shows nothing
    blind_rows = torch.einsum("hsj,si->hij", blind.double(), in_block)
    sure = (kept & (blind_rows == 0)).any(-1)  # a block is chosen that shows each row a key
    assert torch.equal(mask[sure[:, :, of_block]], chosen[sure[:, :, of_block]])
    everything = ~kept.any(-1)[:, :, of_block]
    assert torch.equal(mask[everything], window.expand_as(mask)[everything])
    if stride == (1, 1, 1):  # a query is in its own window
        own = chosen | ((of_block[:, None] == of_block) & window)
        added = ~sure[:, :, of_block] & ~everything
        assert torch.equal(mask[added], own[added])
