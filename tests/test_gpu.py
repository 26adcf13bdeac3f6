"""What only a GPU can show: the kernels at real sizes and precisions, and the patch around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import global_state
import pytest
import tiny_wan
import torch
import torch.nn.functional as F

import tilewise
from tilewise.kernels.attention.dispatch import BACKENDS, block_sparse_attention, block_sparse_op, choose_backend
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window import window_plan

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Real:
    name: str
    grid: Grid
    tile: tuple[int, int, int]
    window: tuple[int, int, int]
    unit: str = "tile"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 128
    batch: int = 1


REAL = [
    Real("STA 30×48×80", Grid(30, 48, 80), (6, 8, 8), (3, 3, 3)),
    Real("STA 21×45×80, ragged", Grid(21, 45, 80), (6, 8, 8), (3, 3, 3), batch=2),
    Real("even window, head dim 64", Grid(21, 30, 52), (7, 5, 7), (2, 4, 3), head_dim=64),
    Real("text, head dim 96, grouped", Grid(9, 32, 32, text=226), (3, 8, 8), (3, 2, 2), head_dim=96, kv_heads=2),
    Real("inward window", Grid(21, 34, 60), (21, 2, 3), (21, 15, 27), unit="token"),
    Real("head dim 256", Grid(9, 32, 32), (3, 8, 8), (3, 3, 3), head_dim=256),
    Real("tile of 48 tokens", Grid(9, 16, 16), (3, 4, 4), (3, 3, 3), head_dim=64),
]


def usable(backend: str, case: Real, dtype: torch.dtype) -> None:
    """Skip what this machine or the kernel does not take, by the reason that a user would get."""
    found = {b.name: b for b in BACKENDS}[backend]
    if reason := found.unavailable(torch.device("cuda")):
        pytest.skip(reason)
    if reason := found.unsupported(*tensors(case, dtype), plan_of(case)[1]):
        pytest.skip(reason)


OURS = ["gluon", "triton"]


def tensors(case: Real, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    shape = (case.batch, case.grid.tokens)
    return [torch.randn(*shape, h, case.head_dim, generator=generator, device="cuda").to(dtype) for h in heads]


def plan_of(case: Real) -> tuple[Layout, BlockPlan]:
    layout = Layout(case.grid, case.tile)
    return layout, window_plan(layout, [case.window], unit=case.unit, device="cuda")  # type: ignore[arg-type]


def mask_of_rows(case: Real, layout: Layout, rows: torch.Tensor) -> torch.Tensor:
    """(rows, S) bool in layout order, by the formula, one axis at a time."""
    at = layout.coords.cuda()
    lengths = case.grid.shape
    if case.unit == "tile":
        at = torch.where(at < 0, at, at // torch.tensor(layout.tile, device="cuda")[:, None])
        lengths = layout.tiles
    mask = torch.ones(len(rows), case.grid.tokens, dtype=torch.bool, device="cuda")
    for axis in range(3):
        w = min(case.window[axis], lengths[axis])
        start = (at[axis, rows] - w // 2).clamp(0, lengths[axis] - w)
        mask &= (at[axis][None] >= start[:, None]) & (at[axis][None] < start[:, None] + w)
    text = at[0] < 0
    return mask | text[None] | text[rows][:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", REAL, ids=[c.name for c in REAL])
@pytest.mark.parametrize("backend", [*OURS, "fa4"])
def test_error_at_most_twice_that_of_pytorch_in_the_same_dtype(case, dtype, backend):
    """FlashAttention's own criterion: against fp32, no worse than 2 × PyTorch's attention in that dtype."""
    layout, plan = plan_of(case)
    q, k, v = tensors(case, dtype)
    usable(backend, case, dtype)
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    rows = torch.randperm(case.grid.tokens, generator=torch.Generator().manual_seed(1))[:192].cuda()
    rows = torch.cat([rows, torch.tensor([0, case.grid.tokens - 1], device="cuda")])
    mask = mask_of_rows(case, layout, rows)[None, None]
    group = case.heads // case.kv_heads

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        qs, ks, vs = (x.to(dtype).transpose(1, 2) for x in (q[:, rows], k, v))
        ks, vs = ks.repeat_interleave(group, 1), vs.repeat_interleave(group, 1)
        scores = (qs @ ks.transpose(2, 3)) * qs.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(-1) @ vs).transpose(1, 2).float(), scores.float().logsumexp(-1)

    exact, exact_lse = dense(torch.float32)
    same_dtype, _ = dense(dtype)
    ours = float((out[:, rows].float() - exact).abs().max())
    theirs = float((same_dtype - exact).abs().max())
    assert ours <= 2 * theirs + 1e-5, f"ours {ours:.2e}, PyTorch's {theirs:.2e}"
    torch.testing.assert_close(lse[:, :, rows], exact_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", OURS)
def test_bit_equal_when_run_twice(backend):
    case = REAL[1]
    usable(backend, case, torch.bfloat16)
    _, plan = plan_of(case)
    q, k, v = tensors(case, torch.bfloat16)
    first = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    second = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", OURS)
def test_every_element_is_written_and_nothing_else_is_read(backend):
    case = Real("inward, one sample", Grid(21, 34, 60), (21, 2, 3), (21, 15, 27), unit="token")
    usable(backend, case, torch.bfloat16)
    _, plan = plan_of(case)
    q, k, v = tensors(case, torch.bfloat16)
    want = block_sparse_attention(q, k, v, plan, backend=backend)
    poisoned = []
    for x in (q, k, v):
        room = torch.full((1, x.shape[1] + 256, x.shape[2], x.shape[3]), torch.nan, device="cuda", dtype=x.dtype)
        room[:, 128:-128] = x
        poisoned.append(room[:, 128:-128])
    assert torch.equal(block_sparse_attention(*poisoned, plan, backend=backend), want)
    assert bool(want.isfinite().all())


def test_strides_of_a_fused_projection_are_read_in_place():
    """q, k and v as chunks of one (B, S, 3·H·D) tensor: both kernels take them as they are."""
    case = REAL[0]
    _, plan = plan_of(case)
    qkv = torch.randn(1, case.grid.tokens, 3 * 4 * 128, device="cuda", dtype=torch.bfloat16)
    chunks = [x.unflatten(2, (4, 128)) for x in qkv.chunk(3, dim=-1)]
    for backend in OURS:
        usable(backend, case, torch.bfloat16)
        want = block_sparse_attention(*(x.contiguous() for x in chunks), plan, backend=backend)
        assert torch.equal(block_sparse_attention(*chunks, plan, backend=backend), want)


@pytest.mark.parametrize("backend", OURS)
def test_queries_without_keys_are_zero(backend):
    """Lists that are empty, and lists whose intervals keep nothing, beside ordinary ones."""
    layout = Layout(Grid(1, 32, 64), (1, 8, 16))
    N = layout.blocks
    full = torch.eye(N, dtype=torch.bool, device="cuda")[None, None].clone()
    full[..., 1:3, :] = False
    partial = torch.zeros_like(full)
    partial[..., 2, 5] = True
    partial[..., 3, 6] = True
    lo_hi = torch.zeros(1, 6, layout.grid.tokens, dtype=torch.int32, device="cuda")
    lo_hi[:, 1::2, 3 * 128 : 3 * 128 + 64] = 99
    plan = plan_from_block_map(layout, full, partial, intervals=lo_hi)
    case = Real("empty", layout.grid, layout.tile, (1, 1, 1), heads=2, kv_heads=2)
    usable(backend, case, torch.bfloat16)
    q, k, v = tensors(case, torch.bfloat16)
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    want, want_lse = masked_attention(q, k, v, plan.to_mask(2).cuda())
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    assert bool((out[:, 128:384] == 0).all())


@pytest.mark.parametrize("backend", OURS)
def test_offsets_pass_two_to_the_31(backend):
    """S · H · D > 2³¹ elements: the last block of the last head is right."""
    layout = Layout(Grid(21, 90, 160), (6, 8, 8))
    heads = 64  # 302,400 tokens × 64 × 128 = 2.5 · 10⁹
    plan = window_plan(layout, [(1, 1, 1)], unit="tile", device="cuda")
    case = Real("large", layout.grid, layout.tile, (1, 1, 1), heads=heads, kv_heads=heads)
    found = {b.name: b for b in BACKENDS}[backend]
    if reason := found.unavailable(torch.device("cuda")):
        pytest.skip(reason)
    q, k, v = (torch.randn(1, case.grid.tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    last = (layout.block_tile == layout.block_tile[-1]).all(1).nonzero()[0, 0]
    rows = slice(int(layout.block_start[last]), case.grid.tokens)
    want, _ = masked_attention(*(x[:, rows, -1:] for x in (q, k, v)), dtype=torch.float32)
    torch.testing.assert_close(out[:, rows, -1:].float(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("gluon", torch.bfloat16)]
)
def test_full_window_is_dense(backend, dtype):
    case = Real("full", Grid(9, 20, 22), (3, 5, 8), (99, 99, 99))
    usable(backend, case, dtype)
    _, plan = plan_of(case)
    q, k, v = tensors(case, dtype)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, plan, backend=backend), dense, atol=tolerance, rtol=tolerance
    )


def test_a_window_a_head():
    layout = Layout(Grid(9, 32, 32), (3, 8, 8))
    windows = [(3, 1, 1), (1, 4, 4), (9, 9, 9)]
    head_set = torch.tensor([2, 0, 1, 0])
    q, k, v = (torch.randn(1, layout.grid.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mixed = block_sparse_attention(q, k, v, window_plan(layout, windows, unit="tile", head_set=head_set, device="cuda"))
    for head, which in enumerate(head_set.tolist()):
        one = (slice(None), slice(None), slice(head, head + 1))
        alone = block_sparse_attention(
            q[one], k[one], v[one], window_plan(layout, [windows[which]], unit="tile", device="cuda")
        )
        assert torch.equal(mixed[one], alone)


@pytest.mark.parametrize("backend", OURS)
def test_operator_passes_opcheck(backend):
    case = REAL[4]
    usable(backend, case, torch.bfloat16)
    _, p = plan_of(case)
    q, k, v = tensors(case, torch.bfloat16)
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
    torch.library.opcheck(block_sparse_op, (q, k, v, *tables, p.guard_bits, p.block, 0.1, backend))


def test_hopper_gets_the_hopper_kernel_and_says_why_where_not():
    if {b.name: b for b in BACKENDS}["gluon"].unavailable(torch.device("cuda")):
        pytest.skip("not a Hopper GPU")
    for case, backend in ((REAL[0], "gluon"), (REAL[5], "triton")):
        q, k, v = tensors(case, torch.bfloat16)
        choice = choose_backend(q, k, v, plan_of(case)[1])
        assert choice.backend == backend
    assert "gluon does not take this: head dimension 256 is not 64 or 128" in choice.reason


class TestPipeline:
    """The patch on a tiny random-weight Wan pipeline, on the GPU."""

    def latents(self, pipe, steps=4):
        generator = torch.Generator("cpu").manual_seed(0)
        return pipe(
            "a red circle", height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=3.0,
            generator=generator, output_type="latent", max_sequence_length=16,
        ).frames  # fmt: skip

    @pytest.fixture
    def pipe(self):
        pipe = tiny_wan.tiny_pipeline().to("cuda")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_full_window_is_dense_and_unpatch_is_exact(self, pipe):
        stock = self.latents(pipe)
        tilewise.patch(pipe, tilewise.STA(window=(99, 99, 99)), steps=(0, 1), strict=True)
        torch.testing.assert_close(self.latents(pipe), stock, atol=1e-3, rtol=1e-3)
        rows = tilewise.summary(pipe).rows
        assert {row.backend for row in rows} <= {"gluon", "triton"}
        assert sum(row.seconds for row in rows) > 0
        tilewise.unpatch(pipe)
        assert torch.equal(self.latents(pipe), stock)

    def test_no_host_synchronisation_in_a_forward(self, pipe):
        """The schedule position, plan and order all come without asking the GPU."""
        tilewise.patch(pipe, tilewise.STA(window=(1, 1, 1)), steps=(0.25, 1), strict=True)
        self.latents(pipe)
        model = pipe.transformer
        pipe.scheduler.set_timesteps(4, device="cuda")
        x = torch.randn(1, 4, 5, 16, 16, device="cuda")
        text = torch.randn(1, 16, tiny_wan.TEXT_DIM, device="cuda")
        timestep = pipe.scheduler.timesteps[:1].clone()
        pipe.scheduler._step_index = 2
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                model(x, timestep, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert {row.kind for row in tilewise.summary(pipe).rows} == {"dense step", "sparse"}


class TestExact:
    """Attention that stays dense runs in the Hopper kernel where that is at least as fast, unless somebody chose a backend."""

    @pytest.fixture
    def model(self):
        if {b.name: b for b in BACKENDS}["gluon"].unavailable(torch.device("cuda")):
            pytest.skip("not a Hopper GPU")
        return tiny_wan.tiny_transformer(attention_head_dim=64).to("cuda", torch.bfloat16)

    def forward(self, model):
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(1, 4, 5, 64, 64, generator=generator, device="cuda", dtype=torch.bfloat16)  # 5,120 tokens
        text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            return model(x, torch.tensor([500.0], device="cuda"), text, return_dict=False)[0].float()

    @pytest.mark.parametrize("method", ["dense", tilewise.STA(window=(1, 1, 1))], ids=["dense", "sta, its dense steps"])
    def test_result_is_stocks_to_rounding_and_counted(self, model, method):
        stock = self.forward(model)
        tilewise.patch(model, method, steps=(0, 0))
        ours = self.forward(model)
        assert float((ours - stock).norm() / stock.norm()) < 1e-2
        assert {(row.kind, row.backend) for row in tilewise.summary(model).rows} == {("dense step", "gluon")}

    def test_a_chosen_backend_and_fuse_false_are_respected(self, model):
        tilewise.patch(model, "dense", fuse=False)
        self.forward(model)
        assert {row.backend for row in tilewise.summary(model).rows} == {"stock"}
        with global_state.restored():  # set_attention_backend of one model is a default for every other
            model.set_attention_backend("_native_cudnn")
            tilewise.patch(model, "dense")
            self.forward(model)
        assert {row.backend for row in tilewise.summary(model).rows} == {"stock"}
