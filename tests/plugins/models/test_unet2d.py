"""UNet2DModel through the checks that every family must pass: all its attention is at one level here."""

from __future__ import annotations

import family_cases
import family_checks
import pytest
import torch
from diffusers import UNet2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.runtime.call_stats import SHORT, SPARSE

LATENTS = (16, 22)


def tiny():
    torch.manual_seed(0)
    config = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16,
    }  # fmt: skip
    return family_cases.weights(UNet2DModel(**config))


def test_unet2d():
    model, grid = tiny(), Grid(1, 8, 11)
    given = {"sample": family_cases.noise(2, 3, *LATENTS), "timestep": torch.tensor(500)}
    stock = family_checks.forward(model, given)
    layers = family_checks.tilewise_layers(model)
    layout = family_checks.SMALL.layout(grid)
    mask = family_checks.SMALL.plan(layout, layers[0].heads, torch.device("cpu")).to_mask(layers[0].heads)
    mask = mask[:, :, layout.inverse][:, :, :, layout.inverse]
    with family_cases.masked_attention(model, mask, grid.tokens) as calls:
        want = family_checks.forward(model, given)
    assert len(calls) == len(layers) == 4  # one down, one in the middle, two up
    assert (want - stock).abs().max() > 1e-3
    for method, expected in ((family_checks.FULL, stock), (family_checks.SMALL, want)):
        with tilewise.patched(model, method, steps=(0, 1), strict=True, min_tokens=0):
            torch.testing.assert_close(family_checks.forward(model, given), expected, atol=2e-5, rtol=2e-5)
            assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
        assert torch.equal(family_checks.forward(model, given), stock)
        assert {row.kind for row in tilewise.summary(model).rows} == {SHORT}
    assert torch.equal(family_checks.forward(model, given), stock)


def test_sizes():
    row = tilewise.explain(tiny(), height=16, width=22, frames=1, method="sta", num_inference_steps=4).rows[0]
    assert row.grid == "1×8×11"
    with pytest.raises(ConfigError, match="height=15 must be a multiple of 2, the nearest is 16"):
        tilewise.explain(tiny(), height=15, width=22, frames=1, method="sta", num_inference_steps=4)
