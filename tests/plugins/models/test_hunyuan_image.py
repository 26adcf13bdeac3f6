"""HunyuanImage through the checks that every family must pass: two texts, with padding, after the image."""

from __future__ import annotations

import family_cases
import family_checks
import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT, WORDS = 7, 4


def tiny(**overrides):
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": 12, "text_embed_2_dim": 8,
        "rope_axes_dim": (8, 8),
    }  # fmt: skip
    return family_cases.weights(HunyuanImageTransformer2DModel(**config | overrides))


def inputs(*size, padded=False, words=True):
    lengths = torch.tensor([[4], [TEXT]] if padded else [[TEXT], [TEXT]])
    given = {
        "hidden_states": family_cases.noise(2, 4, *size),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": family_cases.noise(2, TEXT, 12, seed=1),
        "encoder_attention_mask": (torch.arange(TEXT)[None] < lengths).long(),
    }
    if words:
        given["encoder_hidden_states_2"] = family_cases.noise(2, WORDS, 8, seed=2)
        given["encoder_attention_mask_2"] = torch.ones(2, WORDS, dtype=torch.long)
    return given


def test_hunyuan_image():
    grid = Grid(1, 8, 11, text=TEXT + WORDS)
    family_checks.full_window_is_dense(tiny(), inputs(8, 11), grid)
    family_checks.sparse_is_masked_stock(tiny(), inputs(8, 11), grid)


def test_the_refiner_with_padding():
    model = tiny(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6), text_embed_2_dim=None)
    given = inputs(2, 5, 6, padded=True, words=False)
    family_checks.full_window_is_dense(model, given, Grid(2, 5, 6, text=TEXT))
    family_checks.sparse_is_masked_stock(model, given, Grid(2, 5, 6, text=TEXT))


def test_sizes():
    assert tilewise.explain(tiny(), height=288, width=352, frames=1, method="sta").rows[0].grid == "1×9×11 + 1128 text"
    with pytest.raises(ConfigError, match="height=280 must be a multiple of 32, the nearest is 288"):
        tilewise.explain(tiny(), height=280, width=352, frames=1, method="sta")
