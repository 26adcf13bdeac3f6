"""Block-sparse attention against the oracle: the CPU path here, and the same checks for Triton in its CPU interpreter."""

import os

import pytest
import torch
from plan_cases import CASE_IDS, CASES, Case, layout_mask, two_layouts

from tilewise.kernels.attention.backends.torch import torch_forward
from tilewise.kernels.attention.dispatch import (
    available_backends,
    block_sparse_attention,
    block_sparse_op,
    choose_backend,
)
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan, dense_plan_of_lengths, plan_from_block_map
from tilewise.kernels.plans.dilated import DilatedLayout, axes_plan, axis_windows
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window import window_plan

pytestmark = pytest.mark.interpreted
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def forward(q, k, v, plan, scale=None):
    """The backend under test in this process."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if INTERPRETED:
        from tilewise.kernels.attention.backends.triton import triton_forward

        return triton_forward(q, k, v, plan, scale)
    return torch_forward(q, k, v, plan, scale)


def check(case: Case, q, k, v, dtype=torch.float32, scale=None):
    out, lse = forward(q, k, v, case.plan(), scale)
    want, want_lse = masked_attention(q, k, v, layout_mask(case)[None], scale)
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# The interpreter is slow: there, cases that no other test of it has.
ORACLE = [
    c
    for c in CASES
    if not INTERPRETED
    or c.name not in ("full window", "ragged, odd window", "heads share windows", "one frame", "grouped queries")
]


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case.name)
def test_matches_the_oracle(case):
    check(case, *case.tensors())


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["token window"] if INTERPRETED else ["ragged, even window", "text first", "token window"]
)
def test_half_precision(name, dtype):
    # Triton's interpreter computes bfloat16 products wrongly, so there only float16 is tested; bfloat16 is, on a GPU.
    case = CASES[CASE_IDS.index(name)]
    check(case, *case.tensors(dtype), dtype=dtype)


HEAD_DIMS = [1, 12, 40, 96, 256] if INTERPRETED else [*range(1, 18), 20, 40, 80, 99, 160, 256]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    case = Case("dims", Grid(2, 5, 6), (2, 3, 3), ((1, 1, 1),), head_dim=head_dim)
    check(case, *case.tensors(seed=head_dim))


@pytest.mark.parametrize("head_dim", [5, 12] if INTERPRETED else HEAD_DIMS)
def test_head_dims_of_grouped_queries_in_half_precision(head_dim):
    """Partial blocks and text; NaN behind each head, where a wider kernel could read."""
    case = Case(
        "dims", Grid(2, 5, 6, text=3), (2, 3, 3), ((1, 3, 4),), unit="token", head_dim=head_dim, heads=4, kv_heads=2
    )
    tensors = [torch.nn.functional.pad(x, (0, 9), value=torch.nan) for x in case.tensors(torch.float16)]
    # Slow in the interpreter: one scale for each of its two head dimensions.
    for scale in (None, 0.3) if not INTERPRETED else (None,) if head_dim == 5 else (0.3,):
        check(case, *(x[..., :head_dim] for x in tensors), dtype=torch.float16, scale=scale)


def test_strides_as_they_come():
    case = CASES[CASE_IDS.index("text first")]
    q, k, v = case.tensors()
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.stack([q, k, v], dim=2)  # (B, S, 3, H, D): what a fused projection gives
    want, _ = forward(q, k, v, case.plan())
    for tensors in (heads_first, fused.unbind(2)):
        assert not all(x.is_contiguous() for x in tensors)
        torch.testing.assert_close(forward(*tensors, case.plan())[0], want)


def test_scale_is_used():
    case = CASES[CASE_IDS.index("divisible")]
    check(case, *case.tensors(), scale=0.03)


@pytest.mark.parametrize("name", ["ragged, even window", "token window", "one frame"][1 if INTERPRETED else 0 :])
def test_memory_outside_the_tensors_is_never_used(name):
    """Rows before and after each sample, and the tail of each head, hold NaN."""
    case = CASES[CASE_IDS.index(name)]
    poisoned = []
    for x in case.tensors():
        B, S, H, D = x.shape
        room = torch.full((B, S + 64, H, D + 16), torch.nan)
        room[:, 32 : 32 + S, :, :D] = x
        poisoned.append(room[:, 32 : 32 + S, :, :D])
    check(case, *poisoned)


def test_keys_that_no_one_sees_are_never_used():
    """NaN in the keys and values outside a query block's window leaves its rows untouched."""
    case = CASES[CASE_IDS.index("ragged, even window")]
    q, k, v = case.tensors()
    plan, mask = case.plan(), layout_mask(case)
    want, _ = forward(q, k, v, plan)
    row = case.grid.tokens // 2
    unseen = ~mask[0, row]
    assert bool(unseen.any())
    k[:, unseen], v[:, unseen] = torch.nan, torch.nan
    assert torch.equal(forward(q, k, v, plan)[0][:, row], want[:, row])


@pytest.mark.parametrize(("queries", "keys"), [(150, 7), (128, 256), (1, 129), (260, 300)])
def test_all_keys_of_another_sequence(queries, keys):
    """Rows around the tensors hold NaN."""
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(2, n, 2, 16, generator=generator) for n in (queries, keys, keys))
    want, want_lse = masked_attention(q, k, v, torch.ones(1, 2, queries, keys, dtype=torch.bool), 0.3)
    poisoned = [torch.nn.functional.pad(x, (0, 0, 0, 0, 9, 140), value=torch.nan)[:, 9:-140] for x in (q, k, v)]
    out, lse = forward(*poisoned, dense_plan_of_lengths(queries, keys, q.device), 0.3)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


# In the interpreter, small ones: text of queries and of keys, lists of samples and of heads, with and without partial blocks.
@pytest.mark.parametrize("seed", [3, 15, 22, 29] if INTERPRETED else range(40))
def test_queries_and_keys_of_two_layouts(seed):
    """Ragged maps of random shapes with partial blocks, text on either side, lists of samples and heads, grouped queries."""
    case = two_layouts(seed)
    generator = torch.Generator().manual_seed(seed)
    kv_heads = 1 if seed % 2 else case.heads
    shapes = [
        (case.queries.grid.tokens, case.heads),
        (case.keys.grid.tokens, kv_heads),
        (case.keys.grid.tokens, kv_heads),
    ]
    q, k, v = (torch.randn(case.full.shape[0], *shape, 16, generator=generator) for shape in shapes)
    out, lse = forward(q, k, v, case.plan())
    want, want_lse = masked_attention(q, k, v, case.mask())
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)
    if not INTERPRETED:
        entry = block_sparse_attention(q, k, v, case.plan(), return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(entry, (out, lse), strict=True))


@pytest.mark.skipif(INTERPRETED, reason="slow there; other plans have two layouts too")
def test_a_chunk_of_frames_attends_to_a_cache_of_frames():
    """The last 3 of 12 latent frames against all of them: the last rows of attention within the whole window."""
    case = Case("cache", Grid(12, 5, 6, text=9), (3, 2, 3), ((5, 3, 3),), unit="token", block=32, heads=1, kv_heads=1)
    chunk = Layout(Grid(3, 5, 6, text=9), (3, 5, 2), 32)
    keys = case.layout()
    q, k, v = case.tensors()  # in the keys' order
    want, want_lse = forward(q, k, v, case.plan())
    raster = torch.arange(9 * 30, 12 * 30 + 9)  # last frames, and the text
    at = keys.inverse[raster][chunk.permutation]
    plan = window_plan(chunk, case.windows, unit="token", key_layout=keys, query_offset=(9, 0, 0))
    out, lse = forward(q[:, at], k, v, plan)
    torch.testing.assert_close(out, want[:, at], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse[:, :, at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 2, 3)])
def test_windows_that_are_causal_on_any_axis(dilation):
    """Against each axis written out: the keys at or behind the leader of the query's stride, up to the query."""
    shape, window, stride, causal = (2, 6, 7), (2, 3, 3), (1, 2, 1), (False, True, True)
    layout = DilatedLayout(Grid(*shape), (1, 3, 4), 16, dilation)
    sizes = list(zip(shape, window, stride, dilation, causal, strict=True))
    plan = axes_plan(layout, [axis_windows(*size) for size in sizes])
    seen = []
    for n, w, s, d, ends in sizes:
        i, j = torch.arange(n)[:, None], torch.arange(n)
        size = (n - 1 - i % d) // d + 1  # of the query's residue class
        leader = torch.minimum(i // d // s * s + s - 1, size - 1)
        inside = (j // d > leader - w) & (j <= i) if ends else torch.ones(n, n, dtype=torch.bool)
        seen.append((inside & (i % d == j % d)).double())
    mask = torch.einsum("ab,cd,ef->acebdf", *seen).reshape(84, 84) > 0
    q, k, v = (torch.randn(1, 84, heads, 16) for heads in (2, 1, 1))
    order = layout.permutation
    out, lse = forward(q[:, order], k[:, order], v[:, order], plan)
    want, want_lse = masked_attention(q, k, v, mask)
    torch.testing.assert_close(out[:, layout.inverse].double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[:, :, layout.inverse].double(), want_lse, atol=2e-5, rtol=2e-5)


def empty_rows_plan(partial: bool) -> tuple[BlockPlan, torch.Tensor]:
    """A plan in which some query blocks list nothing, or list only blocks whose intervals keep nothing."""
    layout = Layout(Grid(1, 4, 8), (1, 2, 4), 16)
    full = torch.eye(4, dtype=torch.bool)[None, None].clone()
    full[..., 1, :] = False
    if not partial:
        plan = plan_from_block_map(layout, full)
        return plan, plan.to_mask(1)
    maps = torch.zeros_like(full)
    maps[..., 1, 2] = True
    intervals = torch.zeros(1, 6, 32, dtype=torch.int32)
    intervals[:, 1::2, ::2] = 99  # every other row's interval holds everything, the others' nothing
    plan = plan_from_block_map(layout, full, maps, intervals=intervals)
    return plan, plan.to_mask(1)


@pytest.mark.parametrize("partial", [False, True])
def test_rows_without_keys_are_zero(partial):
    plan, mask = empty_rows_plan(partial)
    assert bool((~mask.any(-1)).any())
    q, k, v = (torch.randn(2, 32, 2, 16) for _ in range(3))
    out, lse = forward(q, k, v, plan)
    want, want_lse = masked_attention(q, k, v, mask)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="slow there; plans of two layouts are of samples too")
def test_a_plan_per_sample_and_independence_of_batch_and_head():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2), 16)
    N = layout.blocks
    maps = torch.rand(3, 2, N, N, generator=torch.Generator().manual_seed(1)) < 0.4
    maps |= torch.eye(N, dtype=torch.bool)
    plan = plan_from_block_map(layout, maps)
    q, k, v = (torch.randn(3, 32, 2, 16) for _ in range(3))
    out, lse = forward(q, k, v, plan)
    want, want_lse = masked_attention(q, k, v, plan.to_mask(2))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[1, :, 0] += 1
    other, _ = forward(*changed, plan)
    same = torch.ones(3, 2, dtype=torch.bool)
    same[1, 0] = False
    assert torch.equal(other.transpose(1, 2)[same], out.transpose(1, 2)[same])


def test_lse_merges_disjoint_keys_exactly():
    layout = Layout(Grid(2, 4, 4), (1, 2, 2), 16)
    left = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    q, k, v = (torch.randn(1, 32, 1, 16) for _ in range(3))
    parts = [forward(q, k, v, plan_from_block_map(layout, m)) for m in (left, ~left)]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0).transpose(2, 3)[..., None]  # (2, B, S, H, 1)
    merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
    want, _ = masked_attention(q, k, v)
    torch.testing.assert_close(merged.double(), want, atol=1e-5, rtol=1e-5)


# ── the rest concerns the public entry point, which is the same in both processes ────────────────────────────────────


@pytest.mark.skipif(INTERPRETED, reason="runs once, in the ordinary process")
class TestEntryPoint:
    def test_chooses_the_cpu_path_and_says_why(self):
        case = CASES[3]
        choice = choose_backend(*case.tensors(), case.plan())
        assert choice.backend == "torch"
        assert "CPU" in choice.reason
        names = [name for name, _, _ in available_backends("cpu")]
        assert names == ["gluon", "fa4", "triton", "torch"]

    @pytest.mark.parametrize("head_dim", [*range(1, 18), 20, 40, 80, 160])
    def test_any_head_dim_is_taken(self, head_dim):
        """The scale is that of the head dimension, whatever a kernel makes of it."""
        case = Case("dims", Grid(2, 5, 6), (2, 3, 3), ((1, 1, 1),), head_dim=head_dim, heads=4, kv_heads=1)
        q, k, v = case.tensors()
        for scale in (None, 0.5):
            out, lse = block_sparse_attention(q, k, v, case.plan(), scale=scale, return_lse=True)
            want, want_lse = masked_attention(q, k, v, layout_mask(case)[None], scale)
            torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(lse, want_lse.float(), atol=2e-5, rtol=2e-5)
            assert torch.equal(block_sparse_attention(q, k, v, case.plan(), scale=scale), out)

    def test_operator_passes_opcheck(self):
        case = CASES[CASE_IDS.index("token window, text")]
        q, k, v = case.tensors()
        p = case.plan()
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
        torch.library.opcheck(block_sparse_op, (q, k, v, *tables, p.guard_bits, p.block, 0.25, "torch"))
        out, lse = block_sparse_op(q, k, v, *tables, p.guard_bits, p.block, 0.25, "torch")
        want, want_lse = block_sparse_attention(q, k, v, p, scale=0.25, return_lse=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda q, k, v: (q[0], k, v), ValueError, "must be"),
            (lambda q, k, v: (q, k[:, :-1], v[:, :-1]), ValueError, "the plan is for"),
            (lambda q, k, v: (q, k.half(), v.half()), TypeError, "one dtype"),
            (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError, "float16, bfloat16, float32"),
            (
                lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]),
                ValueError,
                "head dimension must be 1 to 256, got 0",
            ),
            (lambda *x: [y.repeat(1, 1, 1, 9) for y in x], ValueError, "head dimension must be 1 to 256, got 288"),
            (lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]), ValueError, "contiguous"),
            (
                lambda q, k, v: (q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)),
                ValueError,
                "multiple",
            ),
            (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), ValueError, "one device"),
        ],
    )
    def test_bad_input(self, change, error, message):
        case = CASES[3]
        with pytest.raises(error, match=message) as caught:
            block_sparse_attention(*change(*case.tensors()), case.plan())
        assert "block_sparse_attention(q (" in str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            lambda q, k, v: (q, k.half(), v.half()),
            lambda q, k, v: (q.double(), k.double(), v.double()),
            lambda *x: [y.repeat(1, 1, 1, 9) for y in x],
            lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]),
        ],
    )
    def test_tensors_that_no_backend_takes_are_told_from_mistakes(self, change):
        case = CASES[3]
        with pytest.raises(UnsupportedPlanError):
            choose_backend(*change(*case.tensors()), case.plan())
        with pytest.raises(UnsupportedPlanError, match="cannot run this"):
            choose_backend(*case.tensors(), case.plan(), backend="triton")

    @pytest.mark.parametrize(
        "change",
        [
            lambda q, k, v: (q[:, :-1], k, v),
            lambda q, k, v: (q, k[:, :-1], v[:, :-1]),
            lambda q, k, v: (q[:, :, :1], k[:, :, :1], v[:, :, :1]),
            lambda q, k, v: (q[:1], k[:1], v[:1]),
            lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
        ],
    )
    def test_a_plan_for_other_tensors_is_a_mistake(self, change):
        layout = Layout(Grid(2, 4, 4), (1, 2, 2), 16)
        plan = plan_from_block_map(layout, torch.ones(2, 2, 8, 8, dtype=torch.bool))
        tensors = [torch.randn(2, 32, 2, 16) for _ in range(3)]
        assert choose_backend(*tensors, plan).backend == "torch"
        with pytest.raises(ValueError, match="plan") as caught:
            choose_backend(*change(*tensors), plan)
        assert not isinstance(caught.value, UnsupportedPlanError)

    def test_unknown_or_missing_backend(self):
        case = CASES[3]
        with pytest.raises(ValueError, match="unknown backend 'cuda'; there are gluon, fa4, triton, torch"):
            block_sparse_attention(*case.tensors(), case.plan(), backend="cuda")
        with pytest.raises(RuntimeError, match="cannot run this"):
            block_sparse_attention(*case.tensors(), case.plan(), backend="triton")
