"""Image models with Flux.1's blocks, or one stream of text and image, through the checks that every family must pass."""

from __future__ import annotations

import family_checks
import image_checks
import pytest
import torch
from diffusers import (
    BriaTransformer2DModel,
    Flux3Transformer2DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

TEXT, TEXT_DIM = 7, 12
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": TEXT_DIM, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def bria(**overrides):
    return image_checks.random_weights(
        BriaTransformer2DModel(**FLUX | {"pooled_projection_dim": None, "guidance_embeds": False} | overrides)
    )


def longcat(**overrides):
    return image_checks.random_weights(
        LongCatImageTransformer2DModel(**FLUX | {"pooled_projection_dim": TEXT_DIM} | overrides)
    )


def ovis(**overrides):
    return image_checks.random_weights(OvisImageTransformer2DModel(**FLUX | {"out_channels": 4} | overrides))


def flux3(**overrides):
    config = {
        "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": TEXT_DIM, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    return image_checks.random_weights(Flux3Transformer2DModel(**config | overrides))


def flux3_inputs(h, w, reference=None):
    given = inputs(h, w) | {"img_ids": image_checks.positions(h, w, columns=4), "txt_ids": torch.zeros(TEXT, 4)}
    if reference is not None:
        ids = image_checks.positions(*reference, number=10, columns=4)
        given |= {"image_cond_hidden_states": image_checks.random(2, len(ids), 4, seed=3), "image_cond_ids": ids}
    return given


def krea2(**overrides):
    config = {
        "in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": TEXT_DIM, "num_text_layers": 2,
        "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return image_checks.random_weights(Krea2Transformer2DModel(**config | overrides))


def inputs(h, w, reference=None, first=0):
    """Packed tokens with positions. reference: (h, w) of an image that follows."""
    ids = [image_checks.positions(h, w) + torch.tensor([0, first, first])]
    if reference is not None:
        ids.append(image_checks.positions(*reference, number=2))
    positions = torch.cat(ids)
    return {
        "hidden_states": image_checks.random(2, len(positions), 4),
        "encoder_hidden_states": image_checks.random(2, TEXT, TEXT_DIM, seed=2),
        "timestep": torch.full((2,), 0.5),
        "img_ids": positions,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def krea2_inputs(h, w, padded=False):
    ids = torch.cat([torch.zeros(TEXT, 3), image_checks.positions(h, w)])
    given = {
        "hidden_states": image_checks.random(2, h * w, 4),
        "encoder_hidden_states": image_checks.random(2, TEXT, 2, TEXT_DIM, seed=2),
        "timestep": torch.full((2,), 0.5),
        "position_ids": ids,
    }
    if padded:
        given["encoder_attention_mask"] = torch.arange(TEXT)[None] < torch.tensor([[4], [TEXT]])
    return given


def check(model, given, grid):
    family_checks.full_window_is_dense(model, given, grid)
    image_checks.masked_stock(model, given, grid)


@pytest.mark.parametrize("make", [bria, longcat, ovis])
def test_flux_like(make):
    check(make(), inputs(8, 11, first=512 if make is longcat else 0), Grid(1, 8, 11, text=TEXT, text_first=True))


def test_an_image_to_edit_counts_as_text():
    grid = Grid(1, 8, 10, text=TEXT + 15, text_first=True, opposite=15)
    check(longcat(), inputs(8, 10, reference=(3, 5)), grid)


@pytest.mark.parametrize("reference", [None, (3, 5)])
def test_flux3(reference):
    """Blocks over the image alone, and over text, image and reference images."""
    others = 0 if reference is None else 15
    grid = Grid(1, 8, 11, text=TEXT + others, text_first=True, opposite=others)
    check(flux3(), flux3_inputs(8, 11, reference), grid)


@pytest.mark.parametrize("padded", [False, True])
def test_krea2(padded):
    model, given = krea2(), krea2_inputs(8, 11, padded)
    grid = Grid(1, 8, 11, text=TEXT, text_first=True)
    family_checks.full_window_is_dense(model, given, grid)
    if not padded:
        image_checks.masked_stock(model, given, grid)
    else:  # what a mask hides is no text of the sample
        with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
            alone = {name: x[:1] if name != "position_ids" else x for name, x in given.items()}
            both, one = image_checks.output(model, given), image_checks.output(model, alone)
        torch.testing.assert_close(both[:1], one, atol=2e-5, rtol=2e-5)


def test_sizes():
    told = tilewise.explain(bria(), height=144, width=176, frames=1, method=family_checks.SMALL).rows[0]
    assert told.grid == "1×9×11 + 128 text"
    with pytest.raises(ConfigError, match="height=140 must be a multiple of 16, the nearest is 144"):
        tilewise.explain(krea2(), height=140, width=176, frames=1, method="sta")
