"""Chroma through the checks that every family must pass, and its masks."""

from __future__ import annotations

import copy

import family_checks
import image_checks
import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import make_method
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE

CHANNELS, TEXT_DIM, TEXT = 8, 12, 7
PADDED = torch.arange(TEXT) < torch.tensor([[TEXT], [4]])


def tiny(**overrides):
    config = {
        "in_channels": CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return image_checks.random_weights(ChromaTransformer2DModel(**config | overrides))


def inputs(h, w, padded=None):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, h * w, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, TEXT_DIM, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "img_ids": image_checks.positions(h, w),
        "txt_ids": torch.zeros(TEXT, 3),
        "attention_mask": None if padded is None else torch.cat([padded, torch.ones(2, h * w).to(padded)], dim=1),
    }


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("padded", [None, PADDED], ids=["no mask", "lengths"])
@pytest.mark.parametrize("shape", [(8, 10), (11, 7), (1, 40)])
def test_chroma(model, shape, padded):
    grid = Grid(1, *shape, text=TEXT, text_first=True)
    family_checks.full_window_is_dense(model, inputs(*shape, padded), grid)
    image_checks.masked_stock(model, inputs(*shape, padded), grid)


def test_no_square_mask_is_made_of_booleans(model):
    seen = []
    attn = model.single_transformer_blocks[0].attn
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        handle = attn.register_forward_pre_hook(
            lambda m, a, kw: seen.append(kw["attention_mask"].shape), with_kwargs=True
        )
        image_checks.output(model, inputs(8, 10, PADDED))
        image_checks.output(model, inputs(8, 10, PADDED))
        handle.remove()
    assert seen == [(2, 1, 1, 87)] * 2


@pytest.mark.parametrize("lengths", [(TEXT, 4), (3, 3), (TEXT, TEXT)])
def test_a_mask_that_weighs_padding_runs_sparse_and_exactly(model, lengths):
    """As ChromaPipeline gives it: 1 for a visible token and 0 for padding, added to the scores."""
    padded = (torch.arange(TEXT) < torch.tensor(lengths)[:, None]).float()
    x, hidden = inputs(8, 10, padded), inputs(8, 10, padded.bool())
    if min(lengths) < TEXT:
        assert float((image_checks.output(model, x) - image_checks.output(model, hidden)).abs().max()) > 1e-3
    grid = Grid(1, 8, 10, text=TEXT, text_first=True)
    family_checks.full_window_is_dense(model, x, grid)
    image_checks.masked_stock(model, x, grid)


def grouped(heads, key_heads):
    """A model with fewer key heads than query heads, and the same model with each key head written out for its queries."""
    model = tiny(num_attention_heads=heads)
    found = model, copy.deepcopy(model)
    for layers in zip(*(family_checks.tilewise_layers(model) for model in found), strict=True):
        few, many = (layer.module for layer in layers)
        for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
            if getattr(few, name, None) is None:
                continue
            for parameter in ("weight", "bias"):
                rows = getattr(getattr(few, name), parameter).data.unflatten(0, (heads, -1))[:key_heads]
                getattr(few, name)._parameters[parameter] = torch.nn.Parameter(rows.flatten(0, 1))
                wide = rows.repeat_interleave(heads // key_heads, 0).flatten(0, 1)
                getattr(many, name)._parameters[parameter] = torch.nn.Parameter(wide)
    return found


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_fewer_key_heads_than_query_heads(heads, key_heads):
    """Masks that weigh padding and masks that hide it; static windows, and a choice with all that ranks and compensates."""
    few, many = grouped(heads, key_heads)
    grid = Grid(1, 8, 10, text=TEXT, text_first=True)
    draft = {"tile": (1, 3, 3), "always": (), "min_tokens": 0, "probe": 5}
    methods = [
        family_checks.SMALL,
        make_method("draft", draft | {"density": 0.4}),
        make_method("draft", draft | {"recall": 0.5, "within": {"name": "neighborhood", "window": (1, 5, 5)}}),
        make_method("xattention", draft | {"density": 0.4, "select": "shared", "rank": "error"}),
    ]
    for padded in (PADDED.float(), PADDED):
        x = inputs(8, 10, padded)
        image_checks.masked_stock(many, x, grid)
        for method in methods:
            outputs = []
            for model in (few, many):
                with tilewise.patched(model, method, steps=(0, 1), strict=True):
                    outputs.append(image_checks.output(model, x))
                    (row,) = tilewise.summary(model).rows
                    assert row.kind == SPARSE
            torch.testing.assert_close(*outputs, atol=2e-5, rtol=2e-5)


def test_a_mask_of_another_kind_falls_back(model):
    x = inputs(8, 10, PADDED.float() * 0.5 + 0.25)
    want = image_checks.output(model, x)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
        ours = image_checks.output(model, x)
        (row,) = tilewise.summary(model).rows
        assert row.kind == FALLBACK
        assert "not one of keys alone" in row.reason
    torch.testing.assert_close(ours, want, atol=2e-5, rtol=2e-5)


def test_controlnet_samples_follow_the_order(model):
    samples = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))
    x = inputs(8, 10) | {"controlnet_block_samples": [samples], "controlnet_single_block_samples": [samples]}
    image_checks.masked_stock(model, x, Grid(1, 8, 10, text=TEXT, text_first=True))


@pytest.mark.parametrize("number", [0, 2])
def test_own_processor(model, number):
    image_checks.own_processor(model, inputs(8, 9, PADDED), number)


@pytest.mark.compile
def test_compiled():
    image_checks.compiled_is_eager(tiny(num_single_layers=1), inputs(7, 11, PADDED))  # other sizes: as Flux


def test_pipeline():
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    pipe = ChromaPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=tiny(), **parts)
    generator = torch.Generator().manual_seed(0)
    call = {
        "prompt_embeds": torch.randn(2, TEXT, TEXT_DIM, generator=generator),
        "prompt_attention_mask": PADDED.float(),  # the pipeline's own are floating point too
        "negative_prompt_embeds": torch.randn(2, TEXT, TEXT_DIM, generator=generator),
        "negative_prompt_attention_mask": PADDED.flip(0).float(),
        "height": 144,
        "width": 176,
        "num_inference_steps": 4,
    }
    image_checks.pipeline_full_window_is_dense(pipe, call)
    assert tilewise.explain(pipe, height=144, width=176, frames=1, method="sta").rows[0].grid == "1×9×11 + 512 text"
