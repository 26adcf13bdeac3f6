"""Flux.2 through the checks that every family must pass, and its reference images."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

import tilewise
from tilewise.kernels.layout import Grid
from tilewise.plugins.errors import TilewiseError

CHANNELS, TEXT_DIM, TEXT = 8, 12, 7


def tiny(**overrides):
    config = {
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 16,
    }
    return image_checks.random_weights(Flux2Transformer2DModel(**config | overrides))


def inputs(h, w, *references):
    generator = torch.Generator().manual_seed(0)
    ids = [image_checks.positions(h, w, columns=4)]
    ids += [image_checks.positions(*size, number=10 * i, columns=4) for i, size in enumerate(references, 1)]
    ids = torch.cat(ids)
    return {
        "hidden_states": torch.randn(2, len(ids), CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, TEXT_DIM, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 4.0),
        "img_ids": ids.expand(2, -1, -1),
        "txt_ids": torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1).expand(2, -1, -1),
    }


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("shape", [(8, 10), (11, 7), (1, 40)])
def test_flux2(model, shape):
    grid = Grid(1, *shape, text=TEXT, text_first=True)
    family_checks.full_window_is_dense(model, inputs(*shape), grid)
    family_checks.sparse_is_masked_stock(model, inputs(*shape), grid)


def test_reference_images_are_seen_by_all(model):
    x = inputs(8, 9, (5, 6), (3, 4))
    grid = Grid(1, 8, 9, text=TEXT + 42, text_first=True)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid, others=42)


@pytest.mark.parametrize("number", [0, 2])
def test_own_processor(model, number):
    image_checks.own_processor(model, inputs(8, 9), number)


def test_kept_keys_of_reference_images_are_refused(model):
    x = inputs(8, 9) | {"kv_cache_mode": "extract", "num_ref_tokens": 12}
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1)), pytest.raises(TilewiseError, match="kv_cache_mode"):
        image_checks.output(model, x)


def test_compiled(model):
    image_checks.compiled_is_eager(model, inputs(8, 10), inputs(7, 11), inputs(8, 9, (5, 6)))


def test_pipeline():
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    pipe = Flux2Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny(), **parts)
    call = {
        "prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=torch.Generator().manual_seed(0)),
        "height": 144,
        "width": 176,
        "num_inference_steps": 4,
    }
    image_checks.pipeline_full_window_is_dense(pipe, call)
    assert tilewise.explain(pipe, height=144, width=176, num_frames=1, method="sta").rows[0].grid == "1×9×11 + 512 text"
