"""Every method from the literature in a model: patched by its name, counted, explained before, undone without a trace."""

import math

import pytest
import torch

import tilewise
from tests.helpers.tiny_wan import tiny_pipeline
from tilewise.plugins.methods.base import make_method, method_class

PUBLISHED = [name for name in tilewise.methods() if ".published." in method_class(name).__module__]
SIZE = {"height": 48, "width": 64, "num_frames": 5}
DENSITY = 0.4
TINY = {"tile": (1, 2, 4), "density": DENSITY}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def stock(pipe):
    return clip(pipe)


def options_of(name):
    if name == "delta":
        return {"base": {"name": "draft", "min_tokens": 0, **TINY}, "every": 8}
    return TINY if name == "power" else {"min_tokens": 0, **TINY}


def clip(pipe, seed=0):
    return pipe(
        "a star", **SIZE, num_inference_steps=2, guidance_scale=3.0, output_type="latent", max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_runs_as_it_was_explained(pipe, stock, name):
    method = make_method(name, options_of(name))
    told = tilewise.explain(
        pipe, height=48, width=64, frames=5, num_inference_steps=2, method=tilewise.Config(method, steps=":")
    )
    (row,) = (row for row in told.rows if row.density is not None)
    with tilewise.patched(pipe, method, steps=":", strict=True):
        first = clip(pipe)
        summary = tilewise.summary(pipe)
        assert torch.equal(clip(pipe), first)  # the same again, whatever was remembered
    assert not summary.fallbacks
    assert {row.kind for row in summary.rows} == {"sparse"}
    assert torch.isfinite(first).all()
    assert not torch.equal(first, stock)
    if not math.isnan(row.density):
        assert summary.density == pytest.approx(row.density, abs=0.12)
    assert summary.cost >= summary.density
    assert "_tilewise" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_everything_kept_is_the_stock_clip(pipe, stock, name):
    if name == "delta":
        method = make_method(name, {"base": {"name": "draft", "density": 1.0, "min_tokens": 0}})
    else:
        options = {"density": 1.0} if name == "power" else {"density": 1.0, "min_tokens": 0}
        method = make_method(name, options)
    with tilewise.patched(pipe, method, steps=":", strict=True):
        torch.testing.assert_close(clip(pipe), stock, rtol=1e-3, atol=1e-3)
