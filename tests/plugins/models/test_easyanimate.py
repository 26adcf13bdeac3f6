"""EasyAnimate through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

TEXT, TEXT_DIM = 9, 16
BLOCKS = {"two streams": 9, "one stream after the first": 1}


def denoiser(mmdit_layers=9, **overrides):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "mmdit_layers": mmdit_layers,
    }
    return family_cases.weights(EasyAnimateTransformer3DModel(**{**config, **overrides}))


def inputs(t, h, w, batch=2):
    return {
        "hidden_states": family_cases.noise(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": family_cases.noise(batch, TEXT, TEXT_DIM, seed=1),
    }


def expected(t, h, w, text=TEXT):
    return Grid(t, h, w, text=text, text_first=True)


@pytest.mark.parametrize("mmdit", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 11)])
def test_easyanimate(grid, mmdit):
    family_cases.check(denoiser(mmdit), inputs(*grid), expected(*grid), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_full_window_on_thin_grids(grid):
    family_checks.full_window_is_dense(denoiser(), inputs(*grid), expected(*grid), atol=5e-5)


def test_two_prompts_and_inpainting():
    model = denoiser(text_embed_dim_t5=12, in_channels=9)
    given = inputs(3, 5, 7)
    given["encoder_hidden_states_t5"] = family_cases.noise(2, 4, 12, seed=2)
    given["inpaint_latents"] = family_cases.noise(2, 5, 3, 10, 14, seed=3)
    family_cases.check(model, given, expected(3, 5, 7, TEXT + 4), atol=5e-5)


@pytest.mark.compile
def test_compiled():
    family_cases.compiled_is_eager(denoiser(1), inputs(3, 5, 7))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_foreign_processor_gets_raster_order(layer):
    family_cases.foreign_layer_is_stock(denoiser(1), inputs(3, 5, 7), layer)


def pipeline():
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = EasyAnimatePipeline(
        vae=vae, text_encoder=None, tokenizer=None, transformer=denoiser(), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline():
    pipe = pipeline()
    side = pipe.vae_spatial_compression_ratio * 2
    prompt, seen = family_cases.noise(1, TEXT, TEXT_DIM), torch.ones(1, TEXT, dtype=torch.long)

    def run():
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=-prompt, prompt_attention_mask=seen,
            negative_prompt_attention_mask=seen, height=5 * side, width=7 * side, num_frames=9, guidance_scale=3.0,
            num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {DENSE_STEP: 1 * 2, SPARSE: 3 * 2}
    told = tilewise.explain(pipe, height=5 * side, width=7 * side, frames=9).rows[0]
    grid = pipe.transformer._tilewise.state.grid
    assert told.grid == f"{grid.t}×5×7 + 256 text"
    assert grid == expected(grid.t, 5, 7)
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_explain():
    told = tilewise.explain(denoiser(), height=576, width=1008, frames=49, method="sta").rows[0]
    assert told.grid == "13×36×63 + 256 text"
    with pytest.raises(tilewise.ConfigError, match="height=570 must be a multiple of 16, the nearest is 576"):
        tilewise.explain(denoiser(), height=570, width=1008, frames=49, method="sta")
