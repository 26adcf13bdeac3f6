"""PixArt and Latte, with self-attention over an image or over each frame, through the checks that every family must pass."""

from __future__ import annotations

import family_cases
import pytest
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT_DIM = 12
SHARED = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "cross_attention_dim": 32, "attention_bias": True, "sample_size": 16, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "caption_channels": TEXT_DIM,
}  # fmt: skip


def pixart(**overrides):
    return family_cases.weights(PixArtTransformer2DModel(**SHARED | {"use_additional_conditions": False} | overrides))


def latte(**overrides):
    return family_cases.weights(LatteTransformer3DModel(**SHARED | {"video_length": 3} | overrides))


def inputs(*shape):
    """shape: (h, w) of an image, or (t, h, w)."""
    *frames, h, w = shape
    return {
        "hidden_states": family_cases.noise(2, 4, *frames, 2 * h, 2 * w),
        "encoder_hidden_states": family_cases.noise(2, 7, TEXT_DIM, seed=1),
        "timestep": torch.full((2,), 500),
        **({} if frames else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    }


@pytest.mark.parametrize("shape", [(8, 8), (11, 7)])
def test_pixart(shape):
    family_cases.check(pixart(), inputs(*shape), Grid(1, *shape))


def test_latte():
    """The frames are samples of a batch; the blocks over time stay as they are."""
    model = latte()
    family_cases.check(model, inputs(3, 8, 8), Grid(1, 8, 8))
    with tilewise.patched(model, "sta", steps=(0, 1)):
        family_cases.family_checks.forward(model, inputs(3, 8, 8))
        assert sum(row.calls for row in tilewise.summary(model).rows) == 2


def test_sizes():
    assert tilewise.explain(pixart(), height=144, width=176, frames=1, method="sta").rows[0].grid == "1×9×11"
    assert tilewise.explain(latte(), height=128, width=128, frames=3, method="sta").rows[0].grid == "1×8×8"
    with pytest.raises(ConfigError, match="frames=4 must be 1 to 3, for which it has positions"):
        tilewise.explain(latte(), height=128, width=128, frames=4, method="sta")
