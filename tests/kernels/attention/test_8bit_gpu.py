"""8-bit attention on a GPU: both kernels against the oracle and against the arithmetic they should perform."""

import dataclasses

import pytest
import torch
from plan_cases import Case

import tilewise
from tilewise.kernels.attention.backends.triton_8bit import launch_config
from tilewise.kernels.attention.dispatch import _gluon_unavailable
from tilewise.kernels.attention.dispatch_8bit import (
    KERNELS,
    block_sparse_attention_8bit,
    forward_8bit_naive,
    unavailable_8bit,
)
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.attention.quantize import quantize
from tilewise.kernels.chips import chip_of
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.layout import Grid

pytestmark = pytest.mark.gpu

TILE = (3, 6, 7)  # 126 tokens, and fewer at the borders
CASES = [
    Case("aligned", Grid(6, 16, 16), (2, 8, 8), ((3, 1, 2),), head_dim=128, block=128),
    Case("ragged, batch", Grid(5, 17, 19), TILE, ((2, 2, 2),), head_dim=128, block=128, batch=2),
    Case("partial", Grid(6, 20, 22), (6, 4, 5), ((6, 9, 11),), unit="token", head_dim=128, block=128),
    Case("grouped, text", Grid(5, 17, 19, text=77), TILE, ((1, 2, 2),), heads=8, head_dim=64, block=128),
    Case("windows", Grid(5, 17, 19), TILE, ((1, 1, 1), (9, 9, 9)), head_dim=64, block=128),
]
SMALL_BLOCKS = [
    Case("ragged, 64 rows", Grid(5, 17, 19), (1, 7, 8), ((3, 2, 2),), head_dim=128, block=64),
    Case(
        "partial, text, 32 rows", Grid(3, 10, 11, text=50), (1, 4, 6), ((3, 5, 7),), unit="token", head_dim=64, block=32
    ),
]
BOUND = {"int8": 0.03, "fp8": 0.05}


@pytest.fixture(params=KERNELS)
def backend(request):
    """The Hopper kernel, and the portable one."""
    if reason := unavailable_8bit(torch.device("cuda"), "fp8"):
        pytest.skip(reason)
    if request.param == "gluon" and (reason := _gluon_unavailable(torch.device("cuda"))):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("case", [*CASES, *SMALL_BLOCKS], ids=[c.name for c in [*CASES, *SMALL_BLOCKS]])
def test_close_to_the_oracle_and_to_its_own_arithmetic(case, precision, backend):
    plan = case.plan("cuda")
    q, k, v = case.tensors(torch.bfloat16, "cuda")
    scale = case.head_dim**-0.5
    if backend == "gluon" and case in SMALL_BLOCKS:
        with pytest.raises(UnsupportedPlanError, match="rows, not 128"):
            block_sparse_attention_8bit(q, k, v, plan, precision=precision, backend=backend)
        return
    out, lse = block_sparse_attention_8bit(q, k, v, plan, precision=precision, backend=backend, return_lse=True)
    mask = plan.to_mask(case.heads).cuda()
    want, want_lse = masked_attention(q, k, v, mask, dtype=torch.float32)
    assert float((out.float() - want).norm() / want.norm()) < BOUND[precision]
    torch.testing.assert_close(lse, want_lse, atol=0.03, rtol=0)

    if backend == "triton":
        chip = chip_of(q.device)
        keys = launch_config(case.head_dim, plan.block, plan.row_encoding is not None, chip, precision)["BLOCK_N"]
        if keys < plan.block:  # weights are measured from the maximum of a part of a block, and rounded otherwise
            return
    small = quantize(q, k, v, plan, scale, precision)
    same, same_lse = forward_8bit_naive(small, plan, scale, q.shape[1], torch.float32)
    assert float((out.float() - same).norm() / same.norm()) < 6e-3  # bfloat16 of the output, and weights at a tie
    torch.testing.assert_close(lse, same_lse, atol=5e-3, rtol=0)


def test_far_apart_scores_and_values_stay_finite_and_right(backend):
    """A result in units of the latest block must survive a jump of its scale in either direction."""
    case = CASES[0]
    q, k, v = case.tensors(torch.bfloat16, "cuda")
    k[:, 256:512] *= 12
    k[:, 700:800] *= 0.01
    v[:, 300:600] *= 50
    plan = case.plan("cuda")
    want, _ = masked_attention(q, k, v, plan.to_mask(case.heads).cuda(), dtype=torch.float32)
    out = block_sparse_attention_8bit(q, k, v, plan, backend=backend)
    assert torch.isfinite(out).all()
    assert float((out.float() - want).norm() / want.norm()) < 0.2  # scores of ±50, each to 1 %


def test_rows_without_keys_strides_and_repeats(backend):
    case = CASES[1]
    plan = case.plan("cuda")
    fused = torch.stack(case.tensors(torch.float16, "cuda"), dim=2)  # (B, S, 3, H, D)
    q, k, v = fused.unbind(2)
    out = block_sparse_attention_8bit(q, k, v, plan, backend=backend)
    assert torch.equal(out, block_sparse_attention_8bit(*(x.contiguous() for x in (q, k, v)), plan, backend=backend))
    nothing = dataclasses.replace(plan, ends=torch.zeros_like(plan.ends))
    out, lse = block_sparse_attention_8bit(q, k, v, nothing, backend=backend, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_a_patched_denoiser_runs_in_8_bits():
    if reason := _gluon_unavailable(torch.device("cuda")):
        pytest.skip(reason)
    from benchmarks import step

    config = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 128, "num_layers": 2, "text_dim": 32}
    bench = step.Bench(
        step.Size("two layers", "", (5, 60, 104)), step.build(config, torch.device("cuda"), torch.bfloat16),
        torch.device("cuda"), 0.0, "eager",
    )  # fmt: skip
    model, outputs = bench.model, {}
    for precision in (None, "int8", "fp8"):
        with torch.no_grad(), tilewise.patched(model, tilewise.STA(), steps=(0, 1), strict=True, precision=precision):
            outputs[precision] = bench.forward().float()
            assert {row.backend for row in tilewise.summary(model).rows} == {precision or "gluon"}
    for precision in ("int8", "fp8"):
        away = float((outputs[precision] - outputs[None]).norm() / outputs[None].norm())
        assert 0 < away < BOUND[precision]
