"""Allegro through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

TEXT_DIM = 16


def denoiser(**overrides):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,  # rotations of a third of it for each axis
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 48,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 8,
        "caption_channels": TEXT_DIM,
    }
    return family_cases.weights(AllegroTransformer3DModel(**{**config, **overrides}))


def pipeline(model=None):
    vae = AutoencoderKLAllegro(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = AllegroPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=model or denoiser(),
        scheduler=EulerAncestralDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(model, t, h, w, batch=2):
    """As the pipeline makes them, with a text of 5 tokens and one of 7."""
    pipe = pipeline(model)
    return {
        "hidden_states": family_cases.noise(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": family_cases.noise(batch, 1, 7, TEXT_DIM, seed=1),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2, [1] * 7])[:batch],
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(batch, 16 * h, 16 * w, t, torch.device("cpu")),
    }


@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 11)])
def test_allegro(grid):
    model = denoiser()
    family_cases.check(model, inputs(model, *grid), Grid(*grid), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_full_window_on_thin_grids(grid):
    model = denoiser()
    family_checks.full_window_is_dense(model, inputs(model, *grid), Grid(*grid), atol=5e-5)


def test_a_head_dimension_of_96():
    model = denoiser(attention_head_dim=96, cross_attention_dim=192)
    family_checks.full_window_is_dense(model, inputs(model, 3, 5, 7), Grid(3, 5, 7), atol=5e-5)


@pytest.mark.compile
def test_compiled():
    model = denoiser()
    family_cases.compiled_is_eager(model, inputs(model, 3, 5, 7))


def test_a_foreign_processor_gets_raster_order():
    model = denoiser()
    family_cases.foreign_layer_is_stock(model, inputs(model, 3, 5, 7))


def test_a_mask_over_video_falls_back_to_stock():
    """The pipeline gives none. The mask, made of the latents' own, is brought into the order in force."""
    model = denoiser()
    given = inputs(model, 3, 5, 7)
    given["attention_mask"] = torch.ones(2, 3, 10, 14)
    given["attention_mask"][0, :, :, 8:] = 0
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1)):
        torch.testing.assert_close(family_checks.forward(model, given), stock, atol=2e-5, rtol=2e-5)
        assert "attention mask" in tilewise.summary(model).rows[0].reason


def test_pipeline():
    pipe = pipeline()
    prompt, seen = family_cases.noise(1, 7, TEXT_DIM), torch.ones(1, 7, dtype=torch.long)

    def run():
        return pipe(
            negative_prompt=None, prompt_embeds=prompt, negative_prompt_embeds=-prompt, prompt_attention_mask=seen,
            negative_prompt_attention_mask=seen, height=80, width=112, num_frames=10, guidance_scale=3.0,
            num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-3, rtol=1e-3)
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {DENSE_STEP: 1 * 2, SPARSE: 3 * 2}
    told = tilewise.explain(pipe, height=80, width=112, frames=10).rows[0]
    assert (told.grid, pipe.transformer._tilewise.state.grid) == ("3×5×7", Grid(3, 5, 7))
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_explain():
    told = tilewise.explain(denoiser(), height=720, width=1280, frames=88, method="sta").rows[0]
    assert told.grid == "22×45×80"
    with pytest.raises(tilewise.ConfigError, match="height=728 must be a multiple of 16"):
        tilewise.explain(denoiser(), height=728, width=1280, frames=88, method="sta")
