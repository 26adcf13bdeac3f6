"""Rotary frequencies past the native range: each rule against its paper's words, and the hook on a denoiser."""

from __future__ import annotations

import math

import pytest
import tiny_wan
import torch

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.guidance.rope_scaling import ntk, riflex, scaled_rope, yarn
from tilewise.plugins.methods.inward import Inward

THETA = 10000.0 ** (-torch.arange(0, 44, 2, dtype=torch.float64) / 44)  # Wan's h and w: 44 channels


def test_ntk_is_another_base():
    other = 10000.0 * 3 ** (44 / 42)
    wanted = other ** (-torch.arange(0, 44, 2, dtype=torch.float64) / 44)
    torch.testing.assert_close(ntk(THETA, 30, 90), wanted)


def test_yarn_keeps_the_fast_and_slows_the_slow():
    theta = torch.tensor([2 * math.pi, 1.0, 1e-4], dtype=torch.float64)
    out = yarn(theta, 40, 120)
    assert out[0] == theta[0]  # 40 turns: kept
    assert out[2] == pytest.approx(1e-4 / 3)  # hardly any
    turns = 40 / (2 * math.pi)
    keep = (turns - 1) / 31
    assert out[1] == pytest.approx((1 - keep) / 3 + keep)


def test_riflex_changes_one_frequency():
    out = riflex(THETA, 21, 63)
    (changed,) = (out != THETA).nonzero().flatten().tolist()
    assert changed == int((2 * math.pi / THETA - 21).abs().argmin())
    assert 63 * out[changed] < 2 * math.pi


def forward(model, height, width, frames=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text).sample


def test_in_a_denoiser():
    """Unchanged where nothing is longer; the same in a patched denoiser; taken off without a trace."""
    model = tiny_wan.tiny_transformer()
    native = Grid(3, 4, 5)
    stock, large = forward(model, 4, 5), forward(model, 8, 10)
    with scaled_rope(model, native, spatial="ntk", temporal="riflex"):
        torch.testing.assert_close(forward(model, 4, 5), stock, atol=1e-5, rtol=1e-5)
        scaled = forward(model, 8, 10)
        longer = forward(model, 4, 5, 9)
        tilewise.patch(model, Inward(native=(99, 99)), steps=(0, 1), strict=True)
        torch.testing.assert_close(forward(model, 8, 10), scaled, atol=2e-5, rtol=2e-5)
    with scaled_rope(model, native, spatial="ntk"):  # put on after the patch
        torch.testing.assert_close(forward(model, 8, 10), scaled, atol=2e-5, rtol=2e-5)
    tilewise.unpatch(model)
    assert (scaled - large).abs().max() > 1e-3
    assert (longer - forward(model, 4, 5, 9)).abs().max() > 1e-3
    assert torch.equal(forward(model, 8, 10), large)
    assert not model.rope._forward_hooks
    with scaled_rope(model, native):
        assert not model.rope._forward_hooks


def test_what_is_refused():
    from diffusers import LTXVideoTransformer3DModel

    model = tiny_wan.tiny_transformer()
    with pytest.raises(ConfigError, match="linear"), scaled_rope(model, Grid(1, 1, 1), spatial="linear"):
        pass
    with pytest.raises(ConfigError, match="riflex"), scaled_rope(model, Grid(1, 1, 1), spatial="riflex"):
        pass
    other = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
        caption_channels=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="not Wan's"), scaled_rope(other, Grid(1, 1, 1), spatial="ntk"):
        pass
