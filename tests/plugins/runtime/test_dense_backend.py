"""Which dense calls our own kernel may answer: plain, long self-attention that nobody chose a backend for."""

import family_checks
import pytest
import test_hunyuan_video
import test_qwen_image
import torch
from diffusers.models.attention_dispatch import attention_backend

import tilewise
from tilewise.kernels.attention.dispatch import BACKENDS, block_sparse_attention
from tilewise.kernels.attention.naive import masked_attention
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.masks.padding_mask import Masks
from tilewise.plugins.runtime import dense_backend as exact
from tilewise.plugins.runtime.attention_request import AttentionRequest
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP
from tilewise.plugins.runtime.plan_cache import PlanCache

PLAIN = {"dropout_p": 0.0, "is_causal": False, "backend": None, "parallel_config": None}


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the device were one that the kernel runs on."""
    monkeypatch.setattr(exact, "HOPPER", type(exact.HOPPER)("gluon", "", lambda device: None))


def tensors(tokens=5000, keys=None):
    return [
        torch.empty(1, n, 2, 64, dtype=torch.bfloat16, device="meta") for n in (tokens, keys or tokens, keys or tokens)
    ]


def test_plain_self_attention_is_taken(on_hopper):
    assert exact.takes(AttentionRequest(*tensors(), **PLAIN))
    assert exact.takes(AttentionRequest(*tensors(), **{**PLAIN, "backend": "native"}))


@pytest.mark.parametrize(
    "change",
    [
        {"dropout_p": 0.1},
        {"is_causal": True},
        {"backend": "flash"},
        {"parallel_config": object()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_plain_stays_stock(on_hopper, change):
    assert not exact.takes(AttentionRequest(*tensors(), **{**PLAIN, **change}))


def test_lengths(on_hopper):
    assert not exact.takes(AttentionRequest(*tensors(exact.MIN_TOKENS - 1), **PLAIN))
    assert not exact.takes(AttentionRequest(*tensors(exact.MAX_TOKENS + 1), **PLAIN))
    assert not exact.takes(AttentionRequest(*tensors(5000, 512), **PLAIN))


def test_a_backend_chosen_for_all_of_diffusers_is_respected(on_hopper):
    with attention_backend("_native_math"):
        assert not exact.takes(AttentionRequest(*tensors(), **PLAIN))
    assert exact.takes(AttentionRequest(*tensors(), **PLAIN))


def test_not_on_a_cpu():
    assert not exact.takes(AttentionRequest(*(torch.empty(1, 5000, 2, 64) for _ in range(3)), **PLAIN))


def test_the_plan_is_dense():
    q, k, v = (torch.randn(1, 300, 2, 32) for _ in range(3))
    plan = PlanCache("", tilewise.Dense()).dense_plan(300, torch.device("cpu"))
    assert plan.is_dense
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), masked_attention(q, k, v)[0].float())


@pytest.fixture
def anywhere(monkeypatch):
    """As if any length paid, on a CPU."""
    monkeypatch.setattr(exact, "HOPPER", next(backend for backend in BACKENDS if backend.name == "torch"))
    monkeypatch.setattr(exact, "MIN_TOKENS", 1)


def hunyuan(*lengths):
    inputs = test_hunyuan_video.inputs(None, (2, 10, 14), lengths)
    return test_hunyuan_video.tiny(), inputs


MASKED = {
    "one length": lambda: hunyuan(9, 9),
    "two lengths": lambda: hunyuan(9, 4),
    "text first, two lengths": lambda: (
        test_qwen_image.tiny(),
        test_qwen_image.inputs((1, 7, 8), mask=test_qwen_image.PADDED.expand(2, -1)),
    ),
}


@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize(("method", "kind"), [("dense", DENSE_LAYER), ("sta", DENSE_STEP)])
def test_hidden_text_is_left_out(case, method, kind, anywhere):
    """The output is stock's, in the model's own order and in another."""
    model, inputs = MASKED[case]()
    stock = family_checks.forward(model, inputs)
    steps = (0, 1) if method == "dense" else (0, 0)
    with tilewise.patched(model, method, steps=steps):
        out = family_checks.forward(model, inputs)
        rows = [row for row in tilewise.summary(model).rows if row.kind == kind]
    assert {row.backend for row in rows} == {exact.HOPPER.name}
    torch.testing.assert_close(out, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_fewer_key_heads_than_query_heads(heads, anywhere):
    grid, (H, Hk) = Grid(1, 5, 7, text=5), heads
    query, key, value = (torch.randn(2, grid.tokens, n, 24) for n in (H, Hk, Hk))
    shown = torch.arange(grid.tokens) < torch.tensor([[40], [37]])
    request = AttentionRequest(query, key, value, shown[:, None, None], enable_gqa=True)
    assert exact.takes(request)
    groups = Masks().shown(request.attn_mask, grid, query)
    plan_of = PlanCache("", tilewise.Dense()).dense_plan
    out = exact.attend(groups, request, 0.3, plan_of)
    want = masked_attention(query, key, value, shown[:, None, None], 0.3)[0].float()
    torch.testing.assert_close(out, want.masked_fill(~shown[..., None, None], 0), atol=1e-5, rtol=1e-5)


def test_masks_that_do_more_stay_stock(anywhere):
    """One that weighs keys; and none is read where fusing is off."""
    model, inputs = hunyuan(9)
    stock = family_checks.forward(model, inputs)
    with tilewise.patched(model, "dense", fuse=False):
        torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=0, rtol=0)
    grid, query, masks = Grid(1, 5, 7, text=5), torch.empty(1, 40, 2, 8), Masks()
    assert masks.shown(torch.rand(1, 1, 1, 40), grid, query) == []
    assert masks.shown(torch.zeros(1, 1, 1, 40), grid, query)[0].tokens is None
    assert masks.shown(torch.zeros(1, 1, 1, 99), grid, torch.empty(1, 99, 2, 8)) == []


@pytest.mark.gpu
def test_hidden_text_on_a_gpu():
    """The kernel's own shapes; what is hidden is poisoned."""
    grid, lengths = Grid(2, 48, 52, text=256), (200, 31)
    device, tokens = torch.device("cuda"), grid.tokens
    made = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(2, tokens, 4, 128, device=device, generator=made).to(torch.bfloat16) for _ in range(3)
    )
    shown = torch.arange(tokens, device=device) < grid.video + torch.tensor(lengths, device=device)[:, None]
    groups = Masks().shown(shown[:, None, None], grid, query)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(1, 2) for x in (query, key, value)), attn_mask=shown[:, None, None]
    ).transpose(1, 2)
    for x in (key, value):
        x[~shown] = torch.nan
    assert exact.takes(AttentionRequest(query, key, value))
    out = exact.attend(groups, AttentionRequest(query, key, value), None, PlanCache("", tilewise.Dense()).dense_plan)
    assert out is not None
    torch.testing.assert_close(out[shown].float(), wanted[shown], atol=1e-2, rtol=1e-2)
    assert not out[~shown].any()
