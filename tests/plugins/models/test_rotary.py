"""How keys turn with their position: a family's own tables are the model's, at any position, and exact far away."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel

from tests.helpers.every_family import CASES
from tests.helpers.tiny_wan import tiny_transformer
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.models.common.rotary import Rotary, rotate


def rotary(denoiser: torch.nn.Module) -> Rotary | str:
    family = family_of(denoiser)
    assert family is not None
    return family.rotary(denoiser)


def tiny_skyreels() -> torch.nn.Module:
    return SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [lambda: tiny_transformer(0, attention_head_dim=24), tiny_skyreels], ids=["wan", "skyreels"]
)
def test_tables_are_the_models_own(make):
    denoiser = make()
    found = rotary(denoiser)
    assert isinstance(found, Rotary)
    stock = denoiser.rope(torch.zeros(1, 4, 9, 6, 8))
    ours = found.tables(range(4, 9), 3, 4)
    for a, b in zip(stock, ours, strict=True):
        assert (a.double()[:, 4 * 12 :] - b).abs().max() < 1e-6


def test_angles_far_away_are_exact():
    """Against Python's integers and fractions of 2π in 60 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
    found = rotary(tiny_transformer(0, attention_head_dim=24))
    assert isinstance(found, Rotary)
    for frame in (12, 10**6, 10**7):
        angles = found.time_angles([frame])[0]
        for theta, angle in zip(found.frequencies[0].tolist(), angles.tolist(), strict=True):
            exact = float(Decimal(frame) * Decimal(theta) % (2 * pi))
            assert min(abs(exact - angle), 2 * math.pi - abs(exact - angle)) < 2e-9


def test_rotate_turns_back():
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    angle = torch.rand(5, 4, dtype=torch.float64) * 7
    turned = rotate(x, angle.cos(), angle.sin())
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(turned, torch.view_as_real(z).flatten(-2))
    assert torch.allclose(rotate(turned, angle.cos(), angle.sin(), back=True), x)


@pytest.mark.parametrize("name", CASES)
def test_families_are_served_or_say_why_not(name):
    found = rotary(CASES[name].make())
    assert isinstance(found, Rotary) == name.startswith(("Wan 2", "SkyReels")) or (
        isinstance(found, str) and len(found) > 30
    )


def test_other_frequencies_are_refused():
    strange = tiny_transformer(0)
    strange.rope.freqs_cos[1] = 0.5
    assert "base 10000" in str(rotary(strange))
