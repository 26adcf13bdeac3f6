"""8-bit attention: quantization by its formulas, the arithmetic that the Hopper kernel performs, errors, and the operator."""

import dataclasses
import os

import pytest
import torch
from plan_cases import CHUNK_IDS, CHUNKS, Case

from tilewise.kernels.attention.dispatch_8bit import (
    block_sparse_8bit_op,
    block_sparse_attention_8bit,
    forward_8bit_naive,
)
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.attention.quantize import key_order, quantize, quantize_naive, sample_statistics
from tilewise.kernels.plans.block_plan import dense_plan
from tilewise.kernels.plans.layout import Grid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tilewise.kernels.attention.backends.triton_8bit import triton_8bit_forward
# Tiles of 65 to 120 tokens: blocks with room for 128 rows, most of them ragged.
SMALL = [
    Case("aligned", Grid(4, 8, 8), (2, 8, 8), ((2, 1, 1),), head_dim=64, block=128),
    Case("ragged", Grid(5, 9, 13), (4, 5, 6), ((1, 2, 2),), head_dim=64, block=128),
    Case("windows, batch", Grid(4, 9, 12), (4, 5, 6), ((1, 1, 1), (1, 2, 1)), head_dim=128, block=128, batch=2),
    Case("grouped, text", Grid(4, 10, 12, text=40), (4, 5, 6), ((1, 1, 2),), heads=4, head_dim=64, block=128),
    Case("partial", Grid(4, 10, 12, text=9), (4, 5, 6), ((3, 7, 5),), unit="token", head_dim=64, block=128),
]
QUANTIZED = [SMALL[1], SMALL[2]]
# Blocks with room for 64 and 32 rows too, which the Hopper kernel does not take.
INTERPRETED_CASES = [
    Case("windows, 64 rows, batch", Grid(2, 7, 9), (1, 6, 7), ((2, 1, 1), (1, 2, 1)), head_dim=64, block=64, batch=2),
    Case("grouped, text, 32 rows", Grid(2, 5, 12, text=9), (1, 5, 6), ((1, 1, 1),), heads=4, head_dim=64, block=32),
    Case(
        "partial, 128 rows",
        Grid(4, 5, 12),
        (4, 5, 6),
        ((3, 5, 5),),
        unit="token",
        heads=1,
        kv_heads=1,
        head_dim=128,
        block=128,
    ),
]


def relative(out, want):
    return float((out.double() - want).norm() / want.norm())


def dequantized(x, plan, k_mean):
    """q, k and v (B, S, H, D) float32, as the 8-bit operands stand for them."""
    q = x.q.float() * x.q_facts[:, :, :, 0, :, None]
    k = x.k.float() * x.kv_scales[..., 0, None, None] + k_mean[:, :, None, None]
    back = torch.argsort(key_order(plan.block))
    v = x.v.float()[..., back].transpose(-1, -2) * x.kv_scales[..., 1, None, None]
    v = v * x.v_facts[:, :, 0, None, None] + x.v_facts[:, :, 1, None, None]

    def rows(y, counts):
        return torch.cat([y[:, :, i, :n] for i, n in enumerate(counts.tolist())], dim=2).transpose(1, 2)

    return rows(q, plan.q_rows), rows(k, plan.k_rows), rows(v, plan.k_rows)


@pytest.mark.skipif(INTERPRETED, reason="the naive path")
@pytest.mark.parametrize(("precision", "v_error"), [("int8", 0.012), ("fp8", 0.03)])
@pytest.mark.parametrize("case", SMALL, ids=[c.name for c in SMALL])
def test_quantized_tensors_stand_for_the_originals(case, precision, v_error):
    plan = case.plan()
    q, k, v = case.tensors()
    k, v = k + 3 * torch.randn(k.shape[-1]), v * torch.randn(v.shape[-1]).exp() + 5
    k_mean, v_facts = sample_statistics(k, v)
    x = quantize_naive(q, k, v, plan, 0.1, precision, k_mean, v_facts)
    for y, z, bound in zip(dequantized(x, plan, k_mean), (q, k, v), (0.012, 0.012, v_error), strict=True):
        assert y.shape == z.shape
        spread = z - z.mean(1, keepdim=True)
        assert float((y - z).norm() / spread.norm()) < bound
    # What rounding may cost at most: half a step of the row's or block's own scale.
    assert (
        float(((dequantized(x, plan, k_mean)[0] - q).abs() / q.abs().amax(-1, keepdim=True)).max()) <= 0.5 / 127 + 1e-6
    )


@pytest.mark.interpreted
@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("case", "dtype"), zip(QUANTIZED, (torch.float32, torch.float16), strict=True))
def test_triton_quantizes_like_the_formulas(case, dtype):
    plan = case.plan()
    q, k, v = (x + 1 for x in case.tensors(dtype))
    k_mean, v_facts = sample_statistics(k, v)
    means = torch.randn(2, k.shape[0], plan.block + 3, *k.shape[2:]).to(dtype).unbind()
    got = quantize(q, k, v, plan, 0.1, "int8", means)
    want = quantize_naive(q, k, v, plan, 0.1, "int8", k_mean, v_facts, means)
    assert got.k.shape[2] == len(plan.k_start) + 2
    for name in ("q_facts", "kv_scales", "v_facts"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-5, rtol=1e-5)
    for name in ("q", "k", "v"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.shape == b.shape
        different = (a.int() - b.int()).abs()
        # A quotient at a tie may fall to either side.
        assert int(different.max()) <= 1
        assert float((different > 0).float().mean()) < 1e-3


@pytest.mark.interpreted
@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=[c.name for c in INTERPRETED_CASES])
def test_the_portable_kernel_computes_like_the_formulas(case):
    """The kernel's arithmetic is that of the naive path: both measure weights from the block's own maximum."""
    plan, scale = case.plan(), case.head_dim**-0.5
    q, k, v = case.tensors(torch.float16)
    small = quantize(q, k, v, plan, scale, "int8")
    out, lse = triton_8bit_forward(small, plan, scale, q.shape[1], torch.float32)
    want, want_lse = forward_8bit_naive(small, plan, scale, q.shape[1], torch.float32)
    assert relative(out, want.double()) < 2e-3  # weights at a tie
    torch.testing.assert_close(lse, want_lse, atol=5e-3, rtol=0)
    exact, exact_lse = masked_attention(q, k, v, plan.to_mask(case.heads))
    assert relative(out, exact) < 0.03
    torch.testing.assert_close(lse.double(), exact_lse, atol=0.03, rtol=0)
    assert torch.equal(block_sparse_attention_8bit(q, k, v, plan), out.to(q.dtype))  # what the public function runs
    nothing = dataclasses.replace(plan, ends=torch.zeros_like(plan.ends))
    out, lse = triton_8bit_forward(small, nothing, scale, q.shape[1], torch.float32)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.skipif(INTERPRETED, reason="the naive path")
class TestAttention:
    @pytest.mark.parametrize(("precision", "bound"), [("int8", 0.03), ("fp8", 0.055)])
    @pytest.mark.parametrize("case", SMALL, ids=[c.name for c in SMALL])
    def test_close_to_the_oracle(self, case, precision, bound):
        q, k, v = case.tensors(torch.float16)
        out, lse = block_sparse_attention_8bit(q, k, v, case.plan(), precision=precision, return_lse=True)
        want, want_lse = masked_attention(q, k, v, case.plan().to_mask(case.heads))
        assert out.dtype == q.dtype
        assert relative(out, want) < bound
        torch.testing.assert_close(lse.double(), want_lse, atol=0.03, rtol=0)

    @pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
    def test_queries_of_another_layout(self, case):
        q, k, v = case.tensors(torch.float16)
        plan = case.plan()
        out, lse = block_sparse_attention_8bit(q, k, v, plan, return_lse=True)
        want, want_lse = masked_attention(q, k, v, plan.to_mask(case.heads))
        assert relative(out, want) < 0.03
        torch.testing.assert_close(lse.double(), want_lse, atol=0.03, rtol=0)

    @pytest.mark.parametrize(("precision", "bound"), [("int8", 0.024), ("fp8", 0.04)])
    def test_error_on_unit_variance_inputs(self, precision, bound):
        """The figures of the module's table, over a list of 20 blocks."""
        case = Case("dense", Grid(5, 16, 32), (2, 8, 8), ((9, 9, 9),), heads=1, kv_heads=1, head_dim=128, block=128)
        q, k, v = case.tensors(torch.bfloat16)
        out = block_sparse_attention_8bit(q, k, v, dense_plan(case.layout()), precision=precision)
        want, _ = masked_attention(q, k, v)
        assert bound / 3 < relative(out, want) < bound

    def test_means_of_keys_and_values_cost_no_precision(self):
        case = SMALL[0]
        q, k, v = case.tensors(torch.float16)
        shifted = (k + 8 * torch.randn(64, generator=torch.Generator().manual_seed(1)).half(), v + 20)
        want, want_lse = masked_attention(q, *shifted, case.plan().to_mask(case.heads))
        out, lse = block_sparse_attention_8bit(q, *shifted, case.plan(), return_lse=True)
        assert relative(out - 20, want - 20) < 0.05  # float16 itself keeps 0.01 of 20
        torch.testing.assert_close(lse.double(), want_lse, atol=0.1, rtol=0)

    def test_a_scale_and_equal_rows_and_zeros(self):
        case = SMALL[0]
        q, k, v = case.tensors(torch.float16)
        out = block_sparse_attention_8bit(q, k, v, case.plan(), scale=0.03)
        assert relative(out, masked_attention(q, k, v, case.plan().to_mask(case.heads), 0.03)[0]) < 0.03
        for same in (torch.zeros_like(v), torch.full_like(v, 7)):
            for x in (q, torch.zeros_like(q)):
                torch.testing.assert_close(block_sparse_attention_8bit(x, k, same, case.plan()), same)

    def test_rows_without_keys(self):
        case = SMALL[0]
        plan = case.plan()
        plan = dataclasses.replace(plan, ends=torch.zeros_like(plan.ends))
        out, lse = block_sparse_attention_8bit(*case.tensors(torch.float16), plan, return_lse=True)
        assert not out.any()
        assert (lse == -torch.inf).all()

    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_operator(self, precision):
        case = SMALL[-1]
        p = case.plan()
        q, k, v = case.tensors(torch.float16)
        tables = (
            p.q_start,
            p.q_rows,
            p.k_start,
            p.k_rows,
            p.index,
            p.key_start,
            p.ends,
            p.head_set,
            p.key_encoding,
            p.row_encoding,
        )
        torch.library.opcheck(block_sparse_8bit_op, (q, k, v, *tables, p.guard_bits, p.block, 0.1, precision, ""))

    def test_errors_say_what_to_do(self):
        case = SMALL[0]
        q, k, v = case.tensors(torch.float16)
        with pytest.raises(ValueError, match="precision must be one of int8, fp8, got 'fp4'"):
            block_sparse_attention_8bit(q, k, v, case.plan(), precision="fp4")
        with pytest.raises(RuntimeError, match="not a 16-bit type; use block_sparse_attention"):
            block_sparse_attention_8bit(q.float(), k.float(), v.float(), case.plan())
        with pytest.raises(RuntimeError, match="head dimension 32 is not 64 or 128"):
            block_sparse_attention_8bit(*(x[..., :32] for x in (q, k, v)), case.plan())
        with pytest.raises(RuntimeError, match="room for 16 rows, fewer than 32"):
            block_sparse_attention_8bit(q, k, v, dataclasses.replace(case, tile=(1, 4, 4), block=16).plan())
        with pytest.raises(ValueError, match="backend must be one of gluon, triton, got 'fa4'"):
            block_sparse_attention_8bit(q, k, v, case.plan(), backend="fa4")
        with pytest.raises(RuntimeError, match="Triton kernels need a CUDA device, not cpu"):
            block_sparse_attention_8bit(q, k, v, case.plan(), backend="triton")
        with pytest.raises(ValueError, match="build one for this grid"):
            block_sparse_attention_8bit(q[:, :-1], k, v, case.plan())
