"""Z-Image through the checks that every family must pass, and its padding."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT_DIM = 12


def tiny(**more):
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_DIM,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 80, 80],
    }
    return image_checks.random_weights(ZImageTransformer2DModel(**config | more))


def inputs(h, w, text=(7, 7)):
    generator = torch.Generator().manual_seed(0)
    return {
        "x": [torch.randn(4, 1, 2 * h, 2 * w, generator=generator) for _ in text],
        "t": torch.full((len(text),), 0.5),
        "cap_feats": [torch.randn(n, TEXT_DIM, generator=generator) for n in text],
    }


def grid_of(h, w, text):
    return Grid(1, h, w, text=-(h * w) % 32 + 32 * -(-max(text) // 32))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(autouse=True)
def stacked(monkeypatch):
    """The model gives a list of images."""
    forward = family_checks.forward
    monkeypatch.setattr(family_checks, "forward", lambda model, inputs: torch.stack(list(forward(model, inputs))))


@pytest.mark.parametrize("text", [(7, 7), (40, 7, 12)])
@pytest.mark.parametrize("shape", [(8, 12), (11, 7), (1, 72)])
def test_z_image(model, shape, text):
    grid = grid_of(*shape, text)
    family_checks.full_window_is_dense(model, inputs(*shape, text), grid)
    image_checks.masked_stock(model, inputs(*shape, text), grid)


def test_controlnet_samples_follow_the_order(model):
    x, grid = inputs(7, 11), grid_of(7, 11, (7,))
    x["controlnet_block_samples"] = {0: torch.randn(2, grid.tokens, 32, generator=torch.Generator().manual_seed(1))}
    image_checks.masked_stock(model, x, grid)


@pytest.mark.parametrize("number", [0, 1])  # a refiner's; a layer's
def test_own_processor(model, number):
    image_checks.own_processor(model, inputs(7, 11, (40, 7)), number)


def outputs(model, x):
    """All images of all samples, whatever their sizes."""
    with torch.no_grad():
        return torch.cat([image.flatten() for image in model(**x, return_dict=False)[0]])


def test_images_of_several_sizes_stay_dense_and_are_counted(model):
    unequal = inputs(8, 9) | {"x": [inputs(8, 9)["x"][0], inputs(10, 8)["x"][0]]}
    family_checks.refused_is_stock(model, unequal, "different sizes", outputs)


def test_omni_mode_stays_dense_and_is_counted():
    model, images, prompts = tiny(siglip_feat_dim=6), inputs(6, 8)["x"], inputs(6, 8, (5, 9, 7))["cap_feats"]
    x = {"x": [images], "t": torch.full((1,), 0.5), "cap_feats": [prompts], "image_noise_mask": [[0, 1]]}
    x["siglip_feats"] = [[image_checks.random(4, 5, 6), None]]
    family_checks.refused_is_stock(model, x, "omni mode", outputs)


@pytest.mark.compile
def test_compiled():
    image_checks.compiled_is_eager(tiny(n_layers=1), inputs(7, 11))


def test_pipeline_with_guidance_in_one_batch():
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    pipe = ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny(), **parts)
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": [torch.randn(7, TEXT_DIM, generator=generator)],
        "negative_prompt_embeds": [torch.randn(40, TEXT_DIM, generator=generator)],
        "guidance_scale": 3.0,
        "height": 144,
        "width": 176,
        "num_inference_steps": 4,
    }
    image_checks.pipeline_full_window_is_dense(pipe, call)
    assert tilewise.explain(pipe, height=144, width=176, frames=1, method="sta").rows[0].grid == "1×9×11 + 541 text"
    with pytest.raises(ConfigError, match="multiple of 16"):
        tilewise.explain(pipe, height=150, width=176, frames=1, method="sta")
    most = pipe.transformer.config.axes_lens
    with pytest.raises(ConfigError, match=f"positions for {'×'.join(map(str, most))}"):
        tilewise.explain(pipe, height=144, width=16 * most[2] + 16, frames=1, method="sta")
