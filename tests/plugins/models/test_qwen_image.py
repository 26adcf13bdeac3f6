"""Qwen-Image through the checks that every family must pass, and its own: masks, images to edit, layers."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError, TilewiseError

CHANNELS, TEXT_DIM, TEXT = 8, 12, 7
PADDED = torch.arange(TEXT) < torch.tensor([[TEXT], [4]])


def tiny(**overrides):
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS // 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (4, 6, 6),
    }
    return image_checks.random_weights(QwenImageTransformer2DModel(**config | overrides))


def inputs(*shapes, mask=None, batch=2):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(t * h * w for t, h, w in shapes)
    return {
        "hidden_states": torch.randn(batch, tokens, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_DIM, generator=generator),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [list(shapes)] * batch,
    }


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((8, 10), None), ((1, 40), None), ((11, 7), PADDED), ((8, 10), PADDED[1:]), ((11, 7), PADDED.flip(1))],
    ids=["plain", "one row", "lengths", "same length", "padding first"],
)
def test_qwen_image(model, shape, mask):
    grid = Grid(1, *shape, text=TEXT, text_first=True)
    if mask is not None:
        mask = mask.expand(2, -1)
    x = inputs((1, *shape), mask=mask)
    family_checks.full_window_is_dense(model, x, grid)
    family_checks.sparse_is_masked_stock(model, x, grid)


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_images_to_edit_are_seen_by_all(zero_cond_t):
    model = tiny(zero_cond_t=zero_cond_t)
    x = inputs((1, 8, 9), (1, 5, 6), (1, 3, 2), mask=PADDED)
    grid = Grid(1, 8, 9, text=TEXT + 36, text_first=True, opposite=36)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid)


def test_layers_are_the_grids_t():
    model = tiny(use_layer3d_rope=True)
    x = inputs(*[(1, 6, 7)] * 4)  # three layers and the image that is taken apart
    grid = Grid(3, 6, 7, text=TEXT + 42, text_first=True, opposite=42)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid)


def test_controlnet_samples_follow_the_order(model):
    x = inputs((1, 8, 10))
    x["controlnet_block_samples"] = [torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))]
    image_checks.masked_stock(model, x, Grid(1, 8, 10, text=TEXT, text_first=True))


@pytest.mark.parametrize("shapes", [[(1, 8, 9)], [(1, 8, 9), (1, 5, 6)]])
def test_own_processor(model, shapes):
    image_checks.own_processor(model, inputs(*shapes, mask=PADDED), 0)


@pytest.mark.compile
def test_compiled():
    image_checks.compiled_is_eager(tiny(num_layers=1), inputs((1, 8, 10)), inputs((1, 7, 11), mask=PADDED))
    image_checks.compiled_is_eager(tiny(num_layers=1, zero_cond_t=True), inputs((1, 8, 9), (1, 5, 6)))


def test_sizes_that_do_not_match_are_refused(model):
    x = inputs((1, 8, 10)) | {"img_shapes": [[(1, 8, 9)]] * 2}
    with tilewise.patched(model, family_checks.FULL, steps=(0, 1)), pytest.raises(TilewiseError, match="72 tokens"):
        image_checks.output(model, x)


def pipeline():
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    return QwenImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny(), **parts)


def test_pipeline_with_two_prompts_and_guidance():
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(2, TEXT, TEXT_DIM, generator=generator),
        "prompt_embeds_mask": PADDED.long(),
        "negative_prompt_embeds": torch.randn(2, 3, TEXT_DIM, generator=generator),
        "negative_prompt_embeds_mask": torch.ones(2, 3, dtype=torch.long),
        "true_cfg_scale": 3.0,
        "height": 144,
        "width": 176,
        "num_inference_steps": 4,
    }
    image_checks.pipeline_full_window_is_dense(pipeline(), call)


def test_explain():
    pipe = pipeline()
    row = tilewise.explain(pipe, height=144, width=176, frames=1, method=family_checks.SMALL).rows[0]
    assert row.grid == "1×9×11 + 512 text"
    with pytest.raises(ConfigError, match="width=100 must be a multiple of 16, the nearest is 96"):
        tilewise.explain(pipe, height=144, width=100, frames=1, method="sta")


def test_one_mask_is_read_a_forward_although_each_layer_makes_its_own(model, monkeypatch):
    """Reading a mask waits for the GPU."""
    from tilewise.plugins.masks import padding_mask

    reads, read = [], padding_mask.visible_keys
    monkeypatch.setattr(padding_mask, "visible_keys", lambda *args: reads.append(1) or read(*args))
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        for mask in (PADDED, PADDED.flip(0), PADDED):
            family_checks.forward(model, inputs((1, 11, 7), mask=mask))
    assert len(tilewise.plugins.models.common.registry.family_of(model).layers(model)) == 2
    assert len(reads) == 3
