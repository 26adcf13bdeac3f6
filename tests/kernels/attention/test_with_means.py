"""Means of what a plan leaves out, as further keys of the same launch."""

import math

import pytest
import torch

from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.attention.dispatch import block_sparse_attention_with_means, choose_backend, takes_means
from tilewise.kernels.attention.dispatch_8bit import block_sparse_attention_8bit_with_means
from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.cells import CellLayout
from tilewise.kernels.plans.far_field import with_far_field
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.mean_lists import every_block, mean_lists
from tilewise.kernels.plans.window import window_plan
from tilewise.plugins.runtime.sparse_call import far_means


def test_lists_name_each_block_with_something_in_it():
    even = math.log(12)
    bias = torch.full((2, 5, 300), float("-inf"))
    bias[0, 1] = even  # of the last block's 44 means, some are missing: uneven
    bias[0, 2, 128:256] = even
    bias[0, 3, 7] = even
    bias[1, 4, 299] = 0.5
    lists = mean_lists(bias, even)
    named = [
        [
            (index[:first].tolist(), index[first:last].tolist())
            for index, (first, last) in zip(of_set, ends, strict=True)
        ]
        for of_set, ends in zip(lists.index, lists.ends.tolist(), strict=True)
    ]
    nothing = ([], [])
    assert named == [
        [nothing, ([0, 1], [2]), ([1], []), ([], [0]), nothing],
        [nothing, nothing, nothing, nothing, ([], [2])],
    ]
    assert lists.strides == (5, 1)
    assert every_block(300, torch.device("cpu")).strides == (0, 0)
    assert every_block(300, torch.device("cpu")).ends.tolist() == [[[0, 3]]]


def test_a_far_field_lists_whole_cells_as_even():
    layout = CellLayout(Grid(4, 24, 16), (2, 8, 8), cell=(2, 2, 2))
    plan = with_far_field(window_plan(layout, [(1, 1, 1)], unit="tile", stride=(1, 1, 1)), layout)
    assert plan.far is not None
    hidden = plan.far.bias.isfinite().sum(-1)
    uneven = plan.far.lists.ends[..., 1] - plan.far.lists.ends[..., 0]
    assert plan.far.lists.even_bias == math.log(8) or abs(plan.far.lists.even_bias - math.log(8)) < 1e-6
    # 192 cells are 1½ blocks: a tile of 16 cells is in one of them.
    assert hidden.unique().tolist() == [176]
    assert sorted(uneven.unique().tolist()) == [1, 2]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, means: BlockCompensation) -> torch.Tensor:
    """The softmax over the keys that a query sees and all means, in float64."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    of_block = torch.repeat_interleave(plan.q_rows.long())
    bias = torch.zeros(q.shape[0], heads, q.shape[1], k.shape[1], dtype=torch.float64, device=q.device)
    bias = bias.masked_fill(~plan.to_mask(heads).to(q.device), -torch.inf)
    bias = torch.cat([bias, means.bias.double()[:, :, of_block]], -1)
    keys, values = (
        torch.cat([x, mean], 1).double().repeat_interleave(group, 2).transpose(1, 2)
        for x, mean in ((k, means.key_mean), (v, means.value_mean))
    )
    scores = q.double().transpose(1, 2) @ keys.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    peak = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - peak.masked_fill(peak == -torch.inf, 0))
    return (weights @ values / weights.sum(-1, keepdim=True).clamp_min(1e-300)).transpose(1, 2)


def windows(name: str, device: str) -> tuple[BlockPlan, int]:
    """A plan with a far field, and its tokens."""
    if name == "cells":
        layout = CellLayout(Grid(7, 18, 21, text=5), (3, 8, 5), cell=(3, 2, 2))
        plan = window_plan(
            layout, [(1, 3, 3), (3, 1, 1)], unit="tile", stride=(1, 1, 1), head_set=torch.tensor([0, 1, 1, 0])
        )
    elif name == "even":
        layout = CellLayout(Grid(6, 32, 32), (3, 8, 4), cell=(3, 2, 2))
        plan = window_plan(layout, [(1, 1, 3)], unit="tile", stride=(1, 1, 1))
    else:
        layout = CellLayout(Grid(6, 17, 16), (2, 8, 8), cell=(2, 2, 2))
        plan = window_plan(layout, [(3, 7, 5)], unit="token", stride=(1, 1, 1))
    return with_far_field(plan.to(device), layout), layout.grid.tokens


@pytest.mark.gpu  # each compiles a kernel: as few cases as have all of its parts
@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "kv_heads"),
    [("cells", "bfloat16", 128, 4), ("even", "bfloat16", 128, 2), ("tokens", "float16", 64, 2)],
)
def test_windows_and_cells_in_one_launch(name, dtype, head_dim, kv_heads):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel that takes means needs a Hopper GPU")
    plan, tokens = windows(name, "cuda")
    shapes = [(2, tokens, heads, head_dim) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device="cuda").to(getattr(torch, dtype)) for shape in shapes)
    choice = choose_backend(q, k, v, plan)
    assert takes_means(q, k, v, choice), choice
    means = far_means((q, k, v), plan, q.dtype)
    assert means is not None
    got = block_sparse_attention_with_means(q, k, v, plan, means)
    want = naive(q, k, v, plan, means)
    assert (got.double() - want).norm() / want.norm() < (4e-3 if dtype == "bfloat16" else 6e-4)
    assert (got.double() - want).abs().max() < (3e-2 if dtype == "bfloat16" else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "precision", "head_dim", "bound"), [("cells", "int8", 128, 0.03), ("even", "fp8", 128, 0.05)]
)
def test_in_8_bits(name, precision, head_dim, bound):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel that takes means needs a Hopper GPU")
    plan, tokens = windows(name, "cuda")
    q, k, v = (torch.randn(2, tokens, heads, head_dim, device="cuda").bfloat16() for heads in (4, 2, 2))
    k = k + 2
    means = far_means((q, k, v), plan, q.dtype)
    assert means is not None
    got = block_sparse_attention_8bit_with_means(q, k, v, plan, means, precision=precision)
    want = naive(q, k, v, plan, means)
    assert (got.double() - want).norm() / want.norm() < bound


@pytest.mark.gpu
def test_lists_of_samples_and_query_blocks_that_see_only_means():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel that takes means needs a Hopper GPU")
    layout = CellLayout(Grid(5, 20, 24), (1, 8, 16), cell=(1, 8, 16))
    blocks = layout.blocks
    seen = torch.rand(1, 3, blocks, blocks) < 0.3
    seen[:, :, 2] = False
    plan = plan_from_block_map(layout, seen).to("cuda")
    q, k, v = (torch.randn(2, layout.grid.tokens, 3, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(2, 3, blocks, blocks, device="cuda").masked_fill(seen.cuda(), -torch.inf)
    key, value = (torch.randn(2, blocks, 3, 128, device="cuda") for _ in range(2))
    means = BlockCompensation(key.bfloat16(), value.bfloat16(), bias)
    got = block_sparse_attention_with_means(q, k, v, plan, BlockCompensation(key, value, bias))  # rounded by the call
    want = naive(q, k, v, plan, means)
    assert (got.double() - want).norm() / want.norm() < 4e-3
    assert torch.equal(got, block_sparse_attention_with_means(q, k, v, plan, means))
    with pytest.raises(ValueError, match="do not fit"):
        block_sparse_attention_with_means(q, k, v, plan, BlockCompensation(key[:, 1:], value, bias))
