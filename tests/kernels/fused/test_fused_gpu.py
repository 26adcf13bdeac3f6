"""The fused kernels on a GPU: the dtypes and sizes that the interpreter does not reach."""

import pytest
import torch

from tilewise.kernels.fused.qk_norm_rope import qk_norm_rope
from tilewise.kernels.fused.quantize_rows import quantize_rows, quantize_rows_reference
from tilewise.kernels.fused.reorder import reorder_tokens
from tilewise.kernels.plans.layout import Grid, Layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("M", "K"), [(4680, 5120), (512, 13824), (1, 48), (77, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quantize_rows(M, K, dtype):
    x = torch.randn(M, K + 16, device="cuda").to(dtype)[:, :K]
    x[0] = 0
    q, scale = quantize_rows(x)
    want, want_scale = quantize_rows_reference(x)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    off = (
        q.float() - want.float()
    ).abs()  # division may differ in the last bit, and a value between two numbers fall to either
    assert (off <= want.float().abs() * 2**-3 + 2**-9).all() and (off > 0).float().mean() < 1e-3


DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
SIZES = {
    "Wan 1.3B 480p": (Grid(21, 30, 52), 12, 128),
    "Flux 1024²": (Grid(1, 64, 64, text=512, text_first=True), 24, 128),
    "two samples, ragged, head dim 80": (Grid(5, 17, 19, text=77), 7, 80),
    "head dim 40": (Grid(1, 32, 32), 8, 40),
    "odd head dim": (Grid(3, 7, 5), 3, 5),
    "one token": (Grid(1, 1, 1), 1, 64),
}


def raw(x: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, which can be indexed and compared in every dtype."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    words = torch.randint(-100, 100, shape, generator=generator, device="cuda")
    return words.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
class TestReorder:
    def check(self, tensors: list[torch.Tensor], order: torch.Tensor) -> None:
        for x, out in zip(tensors, reorder_tokens(tensors, order), strict=True):
            assert out.is_contiguous() and out.dtype == x.dtype
            assert torch.equal(raw(out), raw(x.contiguous()).index_select(1, order))

    def test_separate_packed_and_heads_first(self, name, dtype):
        grid, H, D = SIZES[name]
        B, S = 2 if "two" in name else 1, grid.tokens
        layout = Layout(grid, (6, 8, 8))
        for order in (layout.permutation.cuda(), layout.inverse.cuda()):
            self.check([random(B, S, H, D, dtype=dtype)], order)
            packed = random(B, S, 3 * H * D, dtype=dtype)
            self.check([x.unflatten(2, (H, D)) for x in packed.chunk(3, -1)], order)
            self.check([random(B, H, S, D, dtype=dtype).transpose(1, 2) for _ in range(3)], order)

    def test_grouped_queries_and_starts_that_are_not_aligned(self, name, dtype):
        grid, H, D = SIZES[name]
        order = Layout(grid, (6, 8, 8)).permutation.cuda()
        x = random(1, grid.tokens, 2, D + 1, dtype=dtype)
        self.check([random(1, grid.tokens, H, D, dtype=dtype), x[..., 1:], x[..., 1:]], order)

    def test_some_rows_twice_and_some_not_at_all(self, name, dtype):
        grid, H, D = SIZES[name]
        order = torch.arange(grid.tokens, device="cuda")[::3].repeat(2)
        self.check([random(1, grid.tokens, H, D, dtype=dtype)] * 4, order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_queries_and_keys_in_tile_order(name, across, dtype):
    """Equal to the last bit to the same kernel in the order of the input, reordered then."""
    grid, H, D = SIZES[name]
    if D % 2:
        pytest.skip("a head has pairs of channels")
    S = grid.tokens
    q, k, _ = torch.randn(2, S, 3 * H * D, device="cuda").to(dtype).chunk(3, -1)
    weight = torch.randn(H * D if across else D, device="cuda").to(dtype)
    angle = torch.rand(2, S, D // 2, device="cuda") * 6
    options = {"heads": H, "eps": 1e-6, "across_heads": across}
    order = Layout(grid, (6, 8, 8)).permutation.cuda()
    for tables in ((angle.cos(), angle.sin()), (angle[0].cos(), angle[0].sin()), (None, None)):
        want = qk_norm_rope(q, k, weight, weight, *tables, **options)
        got = qk_norm_rope(q, k, weight, weight, *tables, order=order, **options)
        assert all(torch.equal(x, y[:, order]) for x, y in zip(got, want, strict=True))


def test_offsets_pass_two_to_the_31():
    """More than 2³¹ words behind the start, over tokens and over heads."""
    S, H, D = 300_000, 64, 128  # 2.5 · 10⁹ elements of 4 bytes
    x = torch.zeros(1, S, H, D, device="cuda", dtype=torch.float32)
    x[0, -1], x[0, -2, -1] = 3, 4
    order = torch.tensor([S - 1, 0, S - 2], device="cuda")
    assert torch.equal(reorder_tokens([x], order)[0], x[:, order])
    apart = x.view(1, H, S, D).transpose(1, 2)
    assert torch.equal(reorder_tokens([apart], order)[0], apart[:, order])
    assert torch.equal(reorder_tokens([x], torch.arange(S, device="cuda").flip(0))[0][0, :3], x[0, -3:].flip(0))


def test_no_host_synchronisation():
    x = torch.randn(1, 300, 4, 64, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(300, device="cuda")
    reorder_tokens([x], order)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reorder_tokens([x, x, x], order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
