"""What is a reason to run dense, and what is a bug: a bug is raised, not counted as a fallback."""

from __future__ import annotations

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.plugins.runtime import sparse_call
from tilewise.plugins.runtime.call_stats import FALLBACK

METHODS = {
    "static": tilewise.STA(window=(1, 1, 1), tile=(1, 2, 2)),
    "dynamic": tilewise.Draft(density=0.5, tile=(1, 2, 2), min_tokens=0),
}


def forward(model):
    latents, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 16, tiny_wan.TEXT_DIM)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def raising(error: Exception):
    def raises(*args, **kwargs):
        raise error

    return raises


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
@pytest.mark.parametrize("place", ["choose_backend", "run"])
def test_a_bug_is_raised(method, kind, place, monkeypatch):
    model = tiny_wan.tiny_transformer(num_layers=1)
    tilewise.patch(model, METHODS[method], steps=(0, 1))
    if place == "choose_backend":
        monkeypatch.setattr(sparse_call, "choose_backend", raising(kind("a bug")))
    else:
        monkeypatch.setattr(sparse_call, "block_sparse_attention", raising(kind("a bug")))
        monkeypatch.setattr("tilewise.plugins.runtime.attention_call.block_sparse_attention", raising(kind("a bug")))
    with pytest.raises(kind, match="a bug"):
        forward(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_no_kernel_takes_runs_dense_and_is_counted(method, monkeypatch):
    model = tiny_wan.tiny_transformer(num_layers=1)
    tilewise.patch(model, METHODS[method], steps=(0, 1))
    monkeypatch.setattr(sparse_call, "choose_backend", raising(UnsupportedPlanError("no kernel for this test")))
    forward(model)
    (row,) = tilewise.summary(model).rows
    assert (row.kind, row.calls, row.reason) == (FALLBACK, 1, "no kernel for this test")
    tilewise.patch(model, METHODS[method], steps=(0, 1), strict=True)
    with pytest.raises(tilewise.FallbackError, match="no kernel for this test"):
        forward(model)
