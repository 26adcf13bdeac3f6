"""The fused elementwise kernels against PyTorch's own operators in float64: the CPU path here, and the same checks for Triton
in its CPU interpreter; then what compiles ahead of time for a GPU, and what the entry points refuse."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.nn.functional as F

from tilewise.kernels.fused.linear_gelu import linear_gelu, linear_gelu_op
from tilewise.kernels.fused.qk_norm_rope import qk_norm_rope, qk_norm_rope_op
from tilewise.kernels.fused.quantize_rows import quantize_rows
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.fused.residual_norm import gated_residual, layer_norm, residual_norm, residual_norm_op

pytestmark = pytest.mark.interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter has no bfloat16 of its own; it is tested in the ordinary process, and on a GPU.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
FEW = 2 if INTERPRETED else None  # shapes: the interpreter is slow
HALF_ULP = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rounded_once(got: torch.Tensor, want: torch.Tensor) -> None:
    """``got`` is ``want`` (float64) up to one rounding to got's dtype, and float32's error before it."""
    torch.testing.assert_close(got.double(), want, rtol=1.01 * HALF_ULP[got.dtype], atol=3e-6)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with other strides, in the middle of NaN on all sides."""
    room = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 32), torch.nan, dtype=x.dtype)
    view = room[: x.shape[0], 1:-1, 16:-16]
    view.copy_(x)
    return view


def numbered(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 20
    return x.to(dtype)


# ── q and k ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rotary(S: int, D: int, full: bool, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(S, D // 2, generator=torch.Generator().manual_seed(5)) * 6
    if full:
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def oracle(x, weight, cos, sin, heads, eps, across, interleaved):
    """In float64: PyTorch's RMSNorm, then each pair of channels as a complex number, turned."""
    x = x.double()
    D = x.shape[-1] // heads
    weight = None if weight is None else weight.double()
    if across:
        x = F.rms_norm(x, (heads * D,), weight, eps).unflatten(-1, (heads, D))
    else:
        x = F.rms_norm(x.unflatten(-1, (heads, D)), (D,), weight, eps)
    if cos is None:
        return x
    if cos.shape[-1] == D:
        cos, sin = (t[..., ::2] if interleaved else t[..., : D // 2] for t in (cos, sin))
    turn = torch.complex(cos.double(), sin.double())[..., None, :]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., : D // 2], x[..., D // 2 :])
    turned = torch.complex(a.contiguous(), b.contiguous()) * turn
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize(
    ("heads", "depth", "full"), [(3, 16, True), (2, 24, False), (5, 8, True), (1, 64, False)][:FEW]
)
def test_qk_norm_rope(heads, depth, full, across, interleaved, dtype):
    B, S, C = 2, 7, heads * depth
    generator = torch.Generator().manual_seed(heads)
    fused = torch.full((B, S + 1, 3 * C), torch.nan, dtype=dtype)
    fused[:, :S] = torch.randn(B, S, 3 * C, generator=generator).to(dtype) * 3
    fused[:, :, 2 * C :] = torch.nan  # where the values would be
    q, k, _ = fused[:, :S].chunk(3, -1)
    weights = [1 + 0.3 * torch.randn(C if across else depth, generator=generator).to(dtype) for _ in range(2)]
    cos, sin = rotary(S, depth, full, interleaved)
    got = qk_norm_rope(q, k, *weights, cos, sin, heads=heads, eps=1e-6, across_heads=across, interleaved=interleaved)
    for x, out, weight in zip((q, k), got, weights, strict=True):
        assert out.shape == (B, S, heads, depth)
        assert out.dtype == dtype
        assert out.is_contiguous()
        rounded_once(out, oracle(x, weight, cos, sin, heads, 1e-6, across, interleaved))


def test_qk_norm_rope_parts_are_optional():
    q, k = torch.randn(1, 5, 48), torch.randn(1, 5, 16)  # three query heads share one key head
    cos, sin = rotary(5, 16, True, True)
    for tables in ((cos, sin), (None, None)):
        got = qk_norm_rope(q, k, None, torch.full((16,), 2.0), *tables, heads=3, eps=0.1, across_heads=False)
        rounded_once(got[0], oracle(q, None, *tables, 3, 0.1, False, True))
        rounded_once(got[1], 2 * oracle(k, None, *tables, 1, 0.1, False, True))


def test_tables_of_each_sample_and_in_any_shape():
    q, k = torch.randn(2, 2, 5, 32).unbind()
    cos, sin = (torch.stack([t, t.flip(0)]) for t in rotary(5, 16, True, True))
    got = qk_norm_rope(q, k, None, None, cos[:, :, None], sin[:, :, None], heads=2, eps=1e-6)
    rounded_once(got[0], oracle(q, None, cos, sin, 2, 1e-6, True, True))
    rows = torch.full((2, 5, 64), torch.nan)
    rows[..., :16], rows[..., 32:48] = cos, sin
    strided = qk_norm_rope(q, k, None, None, rows[..., :16], rows[..., 32:48], heads=2, eps=1e-6)
    assert torch.equal(strided[1], got[1])
    shared = [
        qk_norm_rope(q, k, None, None, *tables, heads=2, eps=1e-6)[0]
        for tables in ((cos[0], sin[0]), (cos[:1, :, None], sin[:1, :, None]))
    ]
    assert torch.equal(*shared)


@pytest.mark.parametrize(
    ("tables", "across", "heads", "k_heads", "depth", "full"),
    [("shared", False, 4, 1, 24, False), ("a sample", True, 3, 3, 16, True), ("none", True, 2, 1, 8, False)],
)
def test_qk_norm_rope_into_another_order(tables, across, heads, k_heads, depth, full):
    """Equal to the last bit to what is computed in the order of the input and reordered then."""
    S = 5
    packed = torch.full((2, S + 1, (heads + 2 * k_heads) * depth), torch.nan)
    packed[:, :S] = numbered(2, S, packed.shape[2])
    q, k, _ = packed[:, :S].split([heads * depth, k_heads * depth, k_heads * depth], -1)
    weights = [numbered(width, seed=1) for width in ((heads * depth, k_heads * depth) if across else (depth, depth))]
    cos, sin = rotary(S, depth, full, True)
    if tables == "a sample":
        cos, sin = (torch.stack([t, t.flip(0)]) for t in (cos, sin))
    given = (q, k, *weights, *((None, None) if tables == "none" else (cos, sin)))
    options = {"heads": heads, "eps": 1e-6, "across_heads": across}
    order = torch.tensor([4, 9, 1, 9, 0, 9, 1, 9, 2])[::2]  # one token twice, one not at all, strided
    got = qk_norm_rope(*given, order=order, **options)
    for x, plain in zip(got, qk_norm_rope(*given, **options), strict=True):
        assert x.is_contiguous()
        assert torch.equal(x, plain[:, order])


# ── the residual stream ──────────────────────────────────────────────────────────────────────────────────────────────


def modulations(kind: str, B: int, S: int, C: int) -> list[torch.Tensor]:
    """Six of them, as the slices that a model takes of one tensor; NaN lies behind the last."""
    generator = torch.Generator().manual_seed(6)
    if kind == "per token":
        table = torch.full((B, S, 7, C), torch.nan)
        table[:, :, :6] = torch.randn(B, S, 6, C, generator=generator)
        return list(table[:, :, :6].unbind(2))
    table = torch.full((B, 7, C), torch.nan)
    table[:, :6] = torch.randn(B, 6, C, generator=generator)
    return list(table[:, :6].unbind(1)) if kind == "(B, C)" else list(table[:, :6].chunk(6, dim=1))


def layer_norm_oracle(h, eps, weight=None, bias=None, scale=None, shift=None):
    def row(x):
        return 0 if x is None else x.double() if x.ndim != 2 else x.double()[:, None]

    factor = (1 if weight is None else weight.double()) + row(scale)
    return F.layer_norm(h.double(), h.shape[-1:], eps=eps) * factor + row(shift) + row(bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["(B, 1, C)", "(B, C)", "per token"])
@pytest.mark.parametrize(("S", "C"), [(1, 96), (9, 40), (5, 1536)])
def test_modulated(S, C, kind, dtype):
    """What a block does around its attention: LayerNorm and modulation, then gate, residual and the next LayerNorm."""
    h, y = (poisoned(torch.randn(2, S, C, generator=torch.Generator().manual_seed(i)).to(dtype) + 3) for i in (1, 2))
    shift, scale, gate, *_ = modulations(kind, 2, S, C)
    n = layer_norm(h, scale=scale, shift=shift, eps=1e-6)
    assert n.is_contiguous()
    rounded_once(n, layer_norm_oracle(h, 1e-6, scale=scale, shift=shift))
    rows = gate if gate.ndim == 3 else gate[:, None]
    want = h.double() + rows.double() * y.double()
    alone = gated_residual(h, y, gate)
    rounded_once(alone, want)
    both, n = residual_norm(h, y, gate, scale=scale, shift=shift, eps=1e-6)
    assert torch.equal(both, alone)
    rounded_once(n, layer_norm_oracle(both, 1e-6, scale=scale, shift=shift))  # of the rounded sum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_and_plain(dtype):
    h, y = torch.randn(2, 2, 6, 48).to(dtype).unbind()
    weight, bias = torch.randn(2, 48).unbind()
    rounded_once(layer_norm(h, eps=1e-5), layer_norm_oracle(h, 1e-5))
    rounded_once(layer_norm(h, weight=weight, bias=bias, eps=0.5), layer_norm_oracle(h, 0.5, weight, bias))
    total, n = residual_norm(h, y, weight=weight, bias=bias)
    rounded_once(total, h.double() + y.double())
    rounded_once(n, layer_norm_oracle(total, 1e-6, weight, bias))
    rounded_once(gated_residual(h, y.float()), h.double() + y.double())  # y may be of another dtype


def test_parts_that_all_tokens_share():
    """Per-token modulation plus a row of the model: the sum is made in the kernel, not in memory."""
    h, y = torch.randn(2, 2, 6, 48).unbind()
    shift, scale, gate, *_ = (x.bfloat16() for x in modulations("per token", 2, 6, 48))
    row = torch.randn(3, 48)
    total, n = residual_norm(h, y, gate, gate_base=row[0], weight=row[1], bias=row[2], scale=scale, shift=shift)
    rounded_once(total, h.double() + (gate.double() + row[0].double()) * y.double())
    rounded_once(n, layer_norm_oracle(total, 1e-6, row[1], row[2], scale, shift))
    rounded_once(gated_residual(h, y, gate_base=row[0]), h.double() + row[0].double() * y.double())


def test_a_large_mean_costs_no_digits():
    h = torch.randn(1, 3, 256) + 1000
    rounded = layer_norm_oracle(h, 1e-6)
    assert (layer_norm(h) - rounded).abs().max() < 2e-4  # as PyTorch's own in float32
    assert (F.layer_norm(h, (256,)) - rounded).abs().max() < 2e-4


def test_no_tokens():
    assert layer_norm(torch.ones(2, 0, 16)).shape == (2, 0, 16)
    assert qk_norm_rope(*(torch.ones(0, 3, 16),) * 2, *(None,) * 4, heads=1, eps=1.0)[1].shape == (0, 3, 1, 16)


# ── token order ──────────────────────────────────────────────────────────────────────────────────────────────────────

# A copy is exact in any dtype, in the interpreter too.
COPIED = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn]


def check_reordered(tensors: list[torch.Tensor], order: torch.Tensor) -> None:
    for x, out in zip(tensors, reorder_tokens(tensors, order), strict=True):
        assert out.dtype == x.dtype and out.is_contiguous()
        assert out.shape == (x.shape[0], len(order), *x.shape[2:])
        # Compared as float64: not every dtype can be compared, or indexed, on a CPU.
        assert torch.equal(out.double(), x.double()[:, order])


@pytest.mark.parametrize("dtype", COPIED, ids=str)
@pytest.mark.parametrize(
    ("S", "heads", "depth"), [(37, 3, 64), (5, 2, 24), (9, 5, 6), (1, 1, 128), (70, 3, 5), (3, 12, 128), (6, 1, 1)]
)
def test_reorder(S, heads, depth, dtype):
    tensors = [numbered(2, S, heads, depth, dtype=dtype, seed=seed) for seed in range(3)]
    check_reordered(tensors, torch.randperm(S, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_reorder_any_number_of_tensors(count):
    check_reordered([numbered(1, 11, 2, 16, seed=i) for i in range(count)], torch.arange(10, -1, -1))


@pytest.mark.parametrize("order", [[3, 3, 0], [6, 1], [0] * 20, [2], []], ids=str)
def test_reorder_with_repeated_and_missing_rows(order):
    check_reordered([numbered(2, 7, 2, 16)], torch.tensor(order, dtype=torch.int64))


def test_reorder_by_an_order_with_a_stride():
    check_reordered([numbered(1, 5, 2, 16)], torch.tensor([[4, 9], [2, 9], [0, 9], [3, 9]])[:, 0])


def test_reorder_undone():
    x = numbered(2, 50, 3, 32)
    order = torch.randperm(50)
    assert torch.equal(reorder_tokens(reorder_tokens([x], order), order.argsort())[0], x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
class TestReorderedInPlace:
    """Layouts that come up around attention calls, with NaN (100 in int8) around what may be read."""

    order = torch.tensor([4, 0, 3, 1, 5, 2, 6])

    def room(self, dtype, *shape):
        return torch.full(shape, torch.nan if dtype.is_floating_point else 100).to(dtype)

    def test_packed_projection(self, dtype):
        packed = self.room(dtype, 2, 9, 3 * 2 * 16)
        packed[:, 1:-1] = numbered(2, 7, 3 * 2 * 16, dtype=dtype)
        check_reordered([x.unflatten(2, (2, 16)) for x in packed[:, 1:-1].chunk(3, -1)], self.order)

    def test_heads_first(self, dtype):
        x = self.room(dtype, 2, 5, 8, 16)
        x[:, 1:-1, :7] = numbered(2, 3, 7, 16, dtype=dtype)
        apart = x[:, 1:-1, :7].transpose(1, 2)
        check_reordered([apart, apart], self.order)
        check_reordered([apart, numbered(2, 7, 3, 16, dtype=dtype)], self.order)  # beside one whose heads are together

    def test_grouped_queries_and_values_of_another_size(self, dtype):
        shapes = ((6, 16), (2, 16), (2, 24))
        check_reordered([numbered(2, 7, *shape, dtype=dtype) for shape in shapes], self.order)

    def test_strides_and_starts_that_are_odd(self, dtype):
        x = self.room(dtype, 2, 8, 2, 17)
        x[:, 1:, :, 1:] = numbered(2, 7, 2, 16, dtype=dtype)
        check_reordered([x[:, 1:, :, 1:], x[:, 1:, :, 1:15]], self.order)

    def test_channels_apart_and_shared_rows(self, dtype):
        x = numbered(1, 7, 2, 32, dtype=dtype)
        check_reordered(
            [x[..., ::2], x[..., :1].expand(1, 7, 2, 16), x.expand(3, -1, -1, -1)[:1, ..., 16:]], self.order
        )
        check_reordered([x.expand(3, -1, -1, -1), x[:, :1].expand(3, 7, 2, 32)], self.order)


def test_reorder_on_leaves_no_gradients():
    x = numbered(1, 7, 2, 16).requires_grad_()
    assert not reorder_tokens([x], torch.arange(7))[0].requires_grad


# ── the rest is the same in both processes ───────────────────────────────────────────────────────────────────────────


def qk_arguments():
    q, k, _ = torch.randn(2, 5, 96).chunk(3, -1)
    cos, sin = (t[None] for t in rotary(5, 16, True, True))
    return q, k, torch.randn(32), None, cos, sin, 2, 1e-6, True, True


# ── rows in 8 bits ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 16), (5, 100), (3, 1536)])
def test_quantize_rows(M, K, dtype):
    """As near as e4m3 can be: 3 bits of fraction, and below 2⁻⁶ of the scaled row steps of 2⁻⁹."""
    x = poisoned(torch.randn(1, M, K).to(dtype) * torch.logspace(-4, 3, M)[:, None].to(dtype))[0]
    x[0, 0] = 0
    q, scale = quantize_rows(x)
    assert q.is_contiguous() and q.dtype == torch.float8_e4m3fn and scale.shape == (M, 1)
    torch.testing.assert_close(scale[:, 0], x.float().abs().amax(1) / 448, rtol=1e-6, atol=0)
    error = (q.double() * scale.double() - x.double()).abs()
    good = error <= 1.001 * (x.double().abs() * 2.0**-4 + scale.double() * 2.0**-10)
    if INTERPRETED:  # its casts lose the carry where a number rounds up to the next power of two
        good |= torch.frexp(x.double() / scale.double()).mantissa.abs() >= 0.96875
    assert good.all()


def test_quantize_rows_of_zeros_and_of_one_number():
    x = torch.zeros(2, 32)
    x[1] = -3e4
    q, scale = quantize_rows(x)
    assert not q[0].float().any() and (q[1].float() == -448).all() and scale.isfinite().all()
    assert quantize_rows(torch.zeros(0, 32))[0].shape == (0, 32)


@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
class TestEntryPoints:
    @pytest.mark.parametrize(
        ("x", "error"),
        [
            (torch.zeros(2, 3, 4), ValueError),
            (torch.zeros(4, 32).t(), ValueError),
            (torch.zeros(2, 32, dtype=torch.int8), TypeError),
        ],
    )
    def test_bad_quantize_rows(self, x, error):
        with pytest.raises(error, match="quantize_rows"):
            quantize_rows(x)

    def test_operators_pass_opcheck(self):
        torch.library.opcheck(qk_norm_rope_op, qk_arguments())
        torch.library.opcheck(qk_norm_rope_op, (*qk_arguments(), torch.tensor([4, 1, 0, 2, 3])))
        h, y = torch.randn(2, 2, 5, 32).unbind()
        shift, scale, gate, *_ = modulations("(B, 1, C)", 2, 5, 32)
        row = torch.randn(32)
        torch.library.opcheck(residual_norm_op, (h, y, gate, row, row, row, scale, shift, 1e-6, True))
        torch.library.opcheck(residual_norm_op, (h, None, None, None, None, None, None, None, 1e-6, True))
        torch.library.opcheck(residual_norm_op, (h, y, None, None, None, None, None, None, 1e-6, False))
        torch.library.opcheck(linear_gelu_op, (h, torch.randn(8, 32), torch.randn(8)))

    @pytest.mark.compile
    def test_compiled_whole(self):
        h, y = torch.randn(2, 2, 5, 32).unbind()
        _, k, weight, _, cos, sin, *_ = qk_arguments()

        def step(h, y, table):
            shift, scale, gate = table.chunk(3, dim=1)
            h, n = residual_norm(h, y, gate, scale=scale, shift=shift)
            return qk_norm_rope(n, k, weight, None, cos, sin, heads=2, eps=1e-6)[0], gated_residual(h, y)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        table = torch.randn(2, 3, 32)
        for got, want in zip(compiled(h, y, table), step(h, y, table), strict=True):
            assert torch.equal(got, want)

    def test_no_less_exact_than_the_separate_operators(self):
        """bfloat16, as Wan computes it: norm, rounded, turned with float32 tables, rounded."""
        q = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
        weight = (1 + 0.1 * torch.randn(96)).bfloat16()
        cos, sin = rotary(64, 16, True, True)
        n = F.rms_norm(q, (96,), weight, 1e-6).unflatten(2, (6, 16))
        x1, x2 = n.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None, ::2], sin[:, None, 1::2]
        stock = torch.stack([x1 * c - x2 * s, x1 * s + x2 * c], -1).flatten(-2).bfloat16()
        want = oracle(q, weight, cos, sin, 6, 1e-6, True, True)
        ours = qk_norm_rope(q, q, weight, None, cos, sin, heads=6, eps=1e-6)[0]
        errors = [(x.double() - want).square().mean().sqrt() for x in (ours, stock)]
        assert errors[0] < 0.9 * errors[1]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": torch.ones(2, 5, 2, 16)}, ValueError, r"must be \(B, S, H·D\)"),
            ({"k": torch.ones(2, 4, 32)}, ValueError, "the same B and S"),
            ({"heads": 5}, ValueError, "5 heads of an even number"),
            ({"k": torch.ones(2, 5, 24)}, ValueError, "heads of 16 channels"),
            ({"q": torch.ones(2, 5, 64)[..., ::2]}, ValueError, "contiguous"),
            ({"q_weight": torch.ones(16)}, ValueError, r"shape \(32,\) for across_heads=True"),
            ({"cos": None}, ValueError, "both rotary tables"),
            ({"cos": torch.ones(5, 8)}, ValueError, "must have one shape"),
            ({"cos": torch.ones(4, 16), "sin": torch.ones(4, 16)}, ValueError, "S = 5, N = 16 or 8"),
            ({"q": torch.ones(2, 5, 32).double()}, TypeError, "float64"),
            ({"k": torch.ones(2, 5, 32, device="meta")}, ValueError, "one device"),
            ({"order": torch.arange(4)}, ValueError, r"order must have shape \(5,\), got \(4,\)"),
            ({"order": torch.arange(5).int()}, TypeError, "must be int64, got torch.int32"),
            ({"order": torch.arange(5, device="meta")}, ValueError, "one device"),
        ],
    )
    def test_bad_qk(self, change, error, message):
        q, k, q_weight, k_weight, cos, sin, heads, *_ = qk_arguments()
        given = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "heads": heads}
        with pytest.raises(error, match=message) as caught:
            qk_norm_rope(**(given | change), eps=1e-6)
        assert "qk_norm_rope(q (" in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"hidden": torch.ones(5, 32)}, ValueError, r"must be \(B, S, C\)"),
            ({"y": torch.ones(2, 5, 16)}, ValueError, "y must have hidden's shape"),
            ({"weight": torch.ones(16)}, ValueError, r"weight must be contiguous of shape \(32,\)"),
            ({"gate": torch.ones(2, 4, 32)}, ValueError, r"gate must be \(B, C\), \(B, 1, C\) or \(B, S, C\)"),
            ({"scale": torch.ones(2, 1, 64)[..., ::2]}, ValueError, "scale must be"),
            ({"shift": torch.ones(2, 32, dtype=torch.int64)}, TypeError, "int64"),
            ({"bias": torch.ones(32, device="meta")}, ValueError, "one device"),
        ],
    )
    def test_bad_residual(self, change, error, message):
        given = {"hidden": torch.ones(2, 5, 32), "y": torch.ones(2, 5, 32), **change}
        with pytest.raises(error, match=message) as caught:
            residual_norm(**given)
        assert "residual_norm(hidden (" in str(caught.value)

    @pytest.mark.parametrize(
        ("tensors", "order", "error", "message"),
        [
            ([torch.ones(1, 5, 32)], torch.arange(5), ValueError, r"must be \(B, S, H, D\)"),
            ([torch.ones(1, 5, 2, 8), torch.ones(1, 4, 2, 8)], torch.arange(5), ValueError, "the same B and S"),
            ([torch.ones(1, 5, 2, 8)], torch.zeros(1, 5).long(), ValueError, r"shape \(S_out,\)"),
            ([torch.ones(1, 5, 2, 8)], torch.arange(5).int(), TypeError, "must be int64, got torch.int32"),
            ([torch.ones(1, 5, 2, 8, device="meta")], torch.arange(5), ValueError, "on the device of order"),
            ([torch.ones(1, 5, 2, 8)], torch.tensor([5]), (IndexError, RuntimeError), "out of"),
        ],
    )
    def test_bad_reorder(self, tensors, order, error, message):
        with pytest.raises(error, match=message) as caught:
            reorder_tokens(tensors, order)
        assert isinstance(error, tuple) or "reorder_tokens((1, 5," in str(caught.value)

    def test_linear_gelu(self):
        x, weight, bias = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(8)
        z = F.linear(x.double(), weight.double(), bias.double())
        want = z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
        torch.testing.assert_close(linear_gelu(x, weight, bias).double(), want, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=r"weight \(N, K\)"):
            linear_gelu(x, weight.t(), bias)
        with pytest.raises(TypeError, match="one dtype"):
            linear_gelu(x, weight.half(), bias)
        with pytest.raises(ValueError, match="one device"):
            linear_gelu(x, weight, bias.to("meta"))


# ── compiled ahead of time ───────────────────────────────────────────────────────────────────────────────────────────


def compiled(
    kernel, constants: dict, dtype: str, capability: int, warps: int, single: tuple[str, ...] = (), fp8: str = ""
):
    """A kernel compiled for a GPU that need not be there; ``single``: which of its pointers are to float32, ``fp8``: to e4m3."""
    from ahead_of_time import compile_for
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = (
                "*fp8e4nv"
                if name == fp8
                else "*fp32"
                if name in single
                else "*i64"
                if name == "order_ptr"
                else f"*{dtype}"
            )
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name.endswith("_ptr") or name.startswith("stride_"):  # as at run time
            attributes[(position,)] = [["tt.divisibility", 16]]
    attributes = {at: value for at, value in attributes.items() if signature[kernel.arg_names[at[0]]] != "constexpr"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_for(source, capability, num_warps=warps)


def check_code(kernel) -> None:
    """No spills; and every access to a row is 16 bytes a thread (a table row of few channels may be less)."""
    from ahead_of_time import usage

    ptx, used = kernel.asm["ptx"], usage(kernel)
    assert used["spill stores"] == used["spill loads"] == 0, used
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores
    assert all(".v4" in store for store in stores), stores
    assert sum(".v4" in load for load in re.findall(r"ld\.global\S*", ptx)) >= 2


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
@pytest.mark.parametrize("capability", [80, 90])
class TestAheadOfTime:
    @pytest.mark.parametrize("across", [True, False])
    @pytest.mark.parametrize(
        ("heads", "depth", "order"),
        [(12, 128, False), (12, 128, True), (40, 128, True), (24, 64, False), (32, 96, True)],
    )
    def test_qk_norm_rope(self, heads, depth, across, order, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_qk_norm_rope import launch_config, qk_norm_rope_kernel

        config = launch_config(heads, heads, depth)
        warps = config.pop("num_warps")
        constants = {
            "HEADS": heads, "K_HEADS": heads, "D": depth, "ACROSS": across, "INTERLEAVED": True, "FULL_TABLES": True,
            **config, **({} if order else {"order_ptr": None}),
        }  # fmt: skip
        kernel = compiled(qk_norm_rope_kernel, constants, "bf16", capability, warps, ("cos_ptr", "sin_ptr"))
        check_code(kernel)

    @pytest.mark.parametrize(
        "absent", ["y gate gate_base weight bias", "gate_base scale shift", ""], ids=lambda x: f"no {x}"
    )
    @pytest.mark.parametrize("channels", [1536, 3072, 5120, 8192])
    def test_residual_norm(self, channels, absent, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_residual_norm import launch_config, residual_norm_kernel

        config = launch_config(channels)
        warps = config.pop("num_warps")
        constants = {
            "C": channels, "NORM": True, "GATE_PER_TOKEN": False, "SCALE_PER_TOKEN": False, "SHIFT_PER_TOKEN": False,
            **config, **{f"{name}_ptr": None for name in absent.split()},
        }  # fmt: skip
        single = ("gate_ptr", "gate_base_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr")
        check_code(compiled(residual_norm_kernel, constants, "bf16", capability, warps, single))

    @pytest.mark.parametrize("columns", [5120, 13824])
    def test_quantize_rows(self, columns, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_quantize_rows import launch_config, quantize_rows_kernel

        if capability < 89:
            pytest.skip("GPUs before compute capability 8.9 have no float8")
        config = launch_config(columns)
        warps = config.pop("num_warps")
        constants = {"K": columns, "LARGEST": 448.0, **config}
        kernel = compiled(quantize_rows_kernel, constants, "bf16", capability, warps, ("scale_ptr",), "q_ptr")
        from ahead_of_time import usage

        used = usage(kernel)
        assert used["spill stores"] == used["spill loads"] == 0, used
        stores = re.findall(r"st\.global\S*", kernel.asm["ptx"])
        assert sum(".v4" not in store for store in stores) == 1  # the scale
        assert all(".v4" in load for load in re.findall(r"ld\.global\S*", kernel.asm["ptx"]))

    @pytest.mark.parametrize("tensors", [1, 3, 4])
    @pytest.mark.parametrize(
        ("words", "head"), [(768, 768), (2560, 2560), (1536, 64), (160, 20)], ids=lambda x: f"{4 * x} bytes"
    )
    def test_reorder(self, words, head, tensors, capability):
        pytest.importorskip("triton")
        from tilewise.kernels.fused.triton_reorder import TENSORS, launch_config, reorder_kernel

        config = launch_config(words, tensors)
        warps = config.pop("num_warps")
        absent = {f"{name}{i}_ptr": None for name in ("x", "out") for i in range(tensors, TENSORS)}
        constants = {"W": words, "HEAD": head, **config, **absent}
        kernel = compiled(reorder_kernel, constants, "i32", capability, warps)
        check_code(kernel)
        assert kernel.metadata.shared == 0  # nothing is exchanged: the order is loaded where it is needed
        # Each thread loads the order once a row, and nothing but the order in less than 16 bytes.
        loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
        assert len([load for load in loads if ".v4" in load]) == tensors * config["ROWS"] * config["BLOCK_W"] // 512
        assert len([load for load in loads if ".v4" not in load]) == config["ROWS"] * config["BLOCK_W"] // 512
        # All loads stand before the first store.
        assert re.findall(r"(ld|st)\.global", kernel.asm["ptx"]) == ["ld"] * len(loads) + ["st"] * (
            tensors * config["ROWS"] * config["BLOCK_W"] // 512
        )
