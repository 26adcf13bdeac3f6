"""CogView 4 through the checks that every family must pass."""

from __future__ import annotations

import family_cases
import family_checks
import image_checks
import pytest
import torch
from diffusers import CogView4Transformer2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT, TEXT_DIM = 7, 12


def tiny(**overrides):
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "text_embed_dim": TEXT_DIM, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 32, "sample_size": 16,
        "rope_axes_dim": (64, 64),
    }  # fmt: skip
    return image_checks.random_weights(CogView4Transformer2DModel(**config | overrides))


def inputs(h, w, batch=2):
    size = torch.tensor([[16.0 * h, 16.0 * w]] * batch)
    return {
        "hidden_states": image_checks.random(batch, 4, 2 * h, 2 * w),
        "encoder_hidden_states": image_checks.random(batch, TEXT, TEXT_DIM, seed=2),
        "timestep": torch.full((batch,), 500.0),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
    }


@pytest.mark.parametrize("shape", [(8, 10), (11, 7)])
def test_cogview4(shape):
    grid = Grid(1, *shape, text=TEXT, text_first=True)
    family_cases.check(tiny(), inputs(*shape), grid)


def test_a_mask_of_the_text():
    """diffusers adds it to the scores, 1 where a token is: padding is not hidden, its weight is divided by e."""
    given = inputs(8, 10) | {"attention_mask": (torch.arange(TEXT)[None] < torch.tensor([[4], [TEXT]])).float()}
    family_checks.full_window_is_dense(tiny(), given, Grid(1, 8, 10, text=TEXT, text_first=True))


def test_sizes():
    told = tilewise.explain(tiny(), height=144, width=176, frames=1, method=family_checks.SMALL).rows[0]
    assert told.grid == "1×9×11 + 1024 text"
    with pytest.raises(ConfigError, match="height=140 must be a multiple of 16, the nearest is 144"):
        tilewise.explain(tiny(), height=140, width=176, frames=1, method="sta")
