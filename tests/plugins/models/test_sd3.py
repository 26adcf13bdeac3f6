"""Stable Diffusion 3 and 3.5 through the checks that every family must pass, and the second attention of 3.5."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT_DIM, TEXT = 12, 7


def tiny(**overrides):
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 40,
    }
    return image_checks.random_weights(SD3Transformer2DModel(**config | overrides))


SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def inputs(h, w, batch=2):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, 2 * h, 2 * w, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "timestep": torch.full((batch,), 500.0),
    }


@pytest.mark.parametrize("overrides", [{}, SD35], ids=["3", "3.5"])
@pytest.mark.parametrize("shape", [(8, 10), (11, 7), (1, 40)])
def test_sd3(overrides, shape):
    model = tiny(**overrides)
    grid = Grid(1, *shape, text=TEXT)
    family_checks.full_window_is_dense(model, inputs(*shape), grid)
    image_checks.masked_stock(model, inputs(*shape), grid)


def test_controlnet_samples_follow_the_order():
    x = inputs(8, 10)
    x["block_controlnet_hidden_states"] = [torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))]
    image_checks.masked_stock(tiny(**SD35), x, Grid(1, 8, 10, text=TEXT))


def test_fused_projections_before_the_patch():
    model = tiny(qk_norm="rms_norm")  # diffusers' fused processor does not serve a second attention
    model.fuse_qkv_projections()
    family_checks.full_window_is_dense(model, inputs(8, 10), Grid(1, 8, 10, text=TEXT))


@pytest.mark.parametrize("number", [0, 1])
def test_own_processor(number):
    image_checks.own_processor(tiny(**SD35), inputs(8, 9), number)


@pytest.mark.compile
@pytest.mark.parametrize("overrides", [{}, SD35], ids=["3", "3.5"])
def test_compiled(overrides):
    image_checks.compiled_is_eager(tiny(**overrides), inputs(7, 11))


def pipeline():
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny(**SD35), **dict.fromkeys(names)
    )


def test_pipeline_with_guidance_in_one_batch():
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(1, 8, generator=generator),
        "guidance_scale": 4.0,
        "height": 144,
        "width": 176,
        "num_inference_steps": 4,
    }
    image_checks.pipeline_full_window_is_dense(pipeline(), call)


def test_explain():
    pipe = pipeline()
    row = tilewise.explain(pipe, height=144, width=176, frames=1, method=family_checks.SMALL).rows[0]
    assert row.grid == "1×9×11 + 333 text"
    with pytest.raises(ConfigError, match="height=140 must be a multiple of 16, the nearest is 144"):
        tilewise.explain(pipe, height=140, width=176, frames=1, method="sta")
    with pytest.raises(ConfigError, match="positions for 40×40"):
        tilewise.explain(pipe, height=656, width=176, frames=1, method="sta")
