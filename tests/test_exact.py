"""Which dense calls our own kernel may answer: plain, long self-attention that nobody chose a backend for."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from tilewise.kernels.attention import block_sparse_attention
from tilewise.kernels.reference import masked_attention
from tilewise.plugins import exact

PLAIN = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "backend": None, "parallel_config": None}


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the device were one that the kernel runs on."""
    monkeypatch.setattr(exact, "HOPPER", type(exact.HOPPER)("gluon", "", lambda device: None))


def tensors(tokens=5000, keys=None):
    return [
        torch.empty(1, n, 2, 64, dtype=torch.bfloat16, device="meta") for n in (tokens, keys or tokens, keys or tokens)
    ]


def test_plain_self_attention_is_taken(on_hopper):
    assert exact.takes(*tensors(), **PLAIN)
    assert exact.takes(*tensors(), **{**PLAIN, "backend": "native"})


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.ones(1)},
        {"dropout_p": 0.1},
        {"is_causal": True},
        {"backend": "flash"},
        {"parallel_config": object()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_plain_stays_stock(on_hopper, change):
    assert not exact.takes(*tensors(), **{**PLAIN, **change})


def test_lengths(on_hopper):
    assert not exact.takes(*tensors(exact.MIN_TOKENS - 1), **PLAIN)
    assert not exact.takes(*tensors(exact.MAX_TOKENS + 1), **PLAIN)
    assert not exact.takes(*tensors(5000, 512), **PLAIN)


def test_a_backend_chosen_for_all_of_diffusers_is_respected(on_hopper):
    with attention_backend("_native_math"):
        assert not exact.takes(*tensors(), **PLAIN)
    assert exact.takes(*tensors(), **PLAIN)


def test_not_on_a_cpu():
    assert not exact.takes(*(torch.empty(1, 5000, 2, 64) for _ in range(3)), **PLAIN)


def test_the_plan_is_dense():
    q, k, v = (torch.randn(1, 300, 2, 32) for _ in range(3))
    plan = exact.exact_plan(300, torch.device("cpu"))
    assert plan.is_dense
    torch.testing.assert_close(block_sparse_attention(q, k, v, plan), masked_attention(q, k, v)[0].float())
