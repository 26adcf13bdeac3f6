"""Flux.2 through the checks that every family must pass, and its reference images."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

import tilewise
from tilewise.kernels.plans.layout import Grid

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
    grid = Grid(1, 8, 9, text=TEXT + 42, text_first=True, opposite=42)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid)


@pytest.mark.parametrize("number", [0, 2])
def test_own_processor(model, number):
    image_checks.own_processor(model, inputs(8, 9), number)


def with_kept_keys(model, x):
    """Two steps as Flux2KleinKVPipeline has them: reference images first, and then their keys and values alone."""
    with torch.no_grad():
        first, cache = model(**x, kv_cache_mode="extract", num_ref_tokens=12, return_dict=False)
        image = {**x, "hidden_states": x["hidden_states"][:, 12:], "img_ids": x["img_ids"][:, 12:]}
        return torch.cat([first, model(**image, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0]], dim=1)


def test_kept_keys_of_reference_images_stay_dense_and_are_counted():
    model, x = tiny(), inputs(8, 9)
    for layer in family_checks.tilewise_layers(model):
        single = "single" in layer.name
        layer.module.set_processor(Flux2KVParallelSelfAttnProcessor() if single else Flux2KVAttnProcessor())
    x["img_ids"] = torch.cat([image_checks.positions(3, 4, number=10, columns=4).expand(2, -1, -1), x["img_ids"]], 1)
    x["hidden_states"] = torch.cat([image_checks.random(2, 12, CHANNELS), x["hidden_states"]], dim=1)
    family_checks.refused_is_stock(model, x, "kv_cache_mode='(extract|cached)'", with_kept_keys)
    # Without a cache, the same processors run sparse.
    family_checks.full_window_is_dense(model, inputs(8, 9), Grid(1, 8, 9, text=TEXT, text_first=True))


@pytest.mark.compile
def test_compiled():
    image_checks.compiled_is_eager(tiny(num_single_layers=1), inputs(8, 10), inputs(8, 9, (5, 6)))


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
    assert tilewise.explain(pipe, height=144, width=176, frames=1, method="sta").rows[0].grid == "1×9×11 + 512 text"
