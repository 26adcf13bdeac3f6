"""Video models with Wan's blocks in files of their own, through the checks that every family must pass."""

from __future__ import annotations

import family_cases
import pytest
import tiny_wan
import torch
from diffusers import AnyFlowTransformer3DModel, ChronoEditTransformer3DModel, HeliosTransformer3DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": tiny_wan.TEXT_DIM,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def chronoedit(**overrides):
    return family_cases.weights(ChronoEditTransformer3DModel(**CONFIG | overrides))


def anyflow(**overrides):
    return family_cases.weights(AnyFlowTransformer3DModel(**CONFIG | overrides))


def helios(**overrides):
    config = {name: value for name, value in CONFIG.items() if name != "rope_max_seq_len"}
    return family_cases.weights(HeliosTransformer3DModel(**config | {"rope_dim": (4, 6, 6)} | overrides))


def helios_inputs(t, h, w, history=(2, 2, 4)):
    """history: latent frames at each scale."""
    given = inputs(t, h, w) | {"indices_hidden_states": torch.arange(t)[None].expand(2, -1) + 8}
    for number, (frames, name) in enumerate(zip(history, ("short", "mid", "long"), strict=True)):
        given[f"latents_history_{name}"] = family_cases.noise(2, 4, frames, 2 * h, 2 * w, seed=3 + number)
        given[f"indices_latents_history_{name}"] = torch.arange(frames)[None].expand(2, -1)
    return given


def inputs(t, h, w, frames_first=False):
    latents = family_cases.noise(2, 4, t, 2 * h, 2 * w)
    given = {
        "hidden_states": latents.transpose(1, 2) if frames_first else latents,
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": family_cases.noise(2, 8, tiny_wan.TEXT_DIM, seed=1),
    }
    if frames_first:  # a timestep a frame, and the one that the step ends at
        given |= {"timestep": torch.full((2, t), 500.0), "r_timestep": torch.full((2, t), 250.0)}
    return given


@pytest.mark.parametrize("grid", [(4, 5, 8), (2, 7, 6)])
def test_chronoedit(grid):
    """Of two frames the second is the edited picture, at a position of its own."""
    model = chronoedit()
    family_cases.check(model, inputs(*grid), Grid(*grid), atol=5e-5)
    with tilewise.patched(model, "sta"):
        assert tilewise.summary(model).notes == ()


def test_anyflow():
    family_cases.check(anyflow(), inputs(4, 5, 8, frames_first=True), Grid(4, 5, 8), atol=5e-5)


def test_helios():
    """The history, at three scales, is seen by all and sees all."""
    history = 2 * 4 * 6 + 2 * 3 + 2  # patches of (1, 2, 2), (2, 4, 4) and (4, 8, 8), the last ones padded
    grid = Grid(3, 4, 6, text=history, text_first=True)
    for overrides in ({}, {"zero_history_timestep": False, "guidance_cross_attn": False}):
        family_cases.check(helios(**overrides), helios_inputs(3, 4, 6), grid, atol=5e-5)
    told = tilewise.explain(helios(), height=384, width=640, frames=132, num_inference_steps=4, method="sta").rows[0]
    assert told.grid == "9×24×40 + 2400 text"


@pytest.mark.parametrize("make", [chronoedit, anyflow])
def test_sizes(make):
    told = tilewise.explain(make(), height=96, width=128, frames=13, num_inference_steps=4, method="sta").rows[0]
    assert told.grid == "4×6×8"
    with pytest.raises(ConfigError, match=r"frames=14 must be 4·k \+ 1, the nearest is 13"):
        tilewise.explain(make(), height=96, width=128, frames=14, num_inference_steps=4, method="sta")
