"""Motif-Video through the checks that every family must pass: padding, a picture, cross-attention, and a decoder that stays."""

from __future__ import annotations

import family_cases
import family_checks
import torch
from diffusers import MotifVideoTransformer3DModel

import tilewise
from tilewise.kernels.plans.layout import Grid

TEXT, PICTURE = 7, 3


def tiny(**overrides):
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 12, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
        "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True,
    }  # fmt: skip
    return family_cases.weights(MotifVideoTransformer3DModel(**config | overrides))


def inputs(t, h, w, picture=True, padded=True):
    lengths = torch.tensor([[4], [TEXT]] if padded else [[TEXT], [TEXT]])
    given = {
        "hidden_states": family_cases.noise(2, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": family_cases.noise(2, TEXT, 12, seed=1),
        "encoder_attention_mask": torch.arange(TEXT)[None] < lengths,
    }
    return given | ({"image_embeds": family_cases.noise(2, PICTURE, 8, seed=2)} if picture else {})


def test_motif_video():
    grid = Grid(3, 5, 6, text=TEXT + PICTURE)
    family_checks.full_window_is_dense(tiny(), inputs(3, 5, 6), grid)
    family_checks.sparse_is_masked_stock(tiny(), inputs(3, 5, 6), grid)


def test_the_decoder_stays_dense():
    model, given = tiny(num_single_layers=2, num_decoder_layers=1), inputs(3, 5, 6, picture=False, padded=False)
    family_checks.full_window_is_dense(model, given, Grid(3, 5, 6, text=TEXT))
    with tilewise.patched(model, "sta", steps=(0, 1), strict=True):
        family_checks.forward(model, given)
        assert sum(row.calls for row in tilewise.summary(model).rows) == 2  # of three blocks
    told = tilewise.explain(model, height=96, width=128, frames=13, num_inference_steps=4, method="sta").rows[0]
    assert told.grid == "4×6×8 + 512 text"
