"""SkyReels-V2, with one timestep or one a frame, through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import tiny_wan
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.call_stats import DENSE_STEP, FALLBACK, SPARSE


def denoiser(**overrides):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": tiny_wan.TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return family_cases.weights(SkyReelsV2Transformer3DModel(**{**config, **overrides}))


def inputs(t, h, w, batch=2, forcing=False):
    given = {
        "hidden_states": family_cases.noise(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": family_cases.noise(batch, 16, tiny_wan.TEXT_DIM, seed=1),
    }
    if forcing:  # a timestep a frame
        given["timestep"] = torch.linspace(900, 50, batch * t).view(batch, t)
        given["enable_diffusion_forcing"] = True
    return given


@pytest.mark.parametrize("forcing", [False, True], ids=["one timestep", "a timestep a frame"])
@pytest.mark.parametrize("grid", [(5, 8, 8), (3, 5, 11)])
def test_skyreels(grid, forcing):
    family_cases.check(denoiser(), inputs(*grid, forcing=forcing), Grid(*grid), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9), (4, 1, 1)])
def test_full_window_on_thin_grids(grid):
    family_checks.full_window_is_dense(denoiser(), inputs(*grid, forcing=True), Grid(*grid), atol=5e-5)


def test_frame_rates_and_images():
    model = denoiser(inject_sample_info=True, image_dim=16, added_kv_proj_dim=32)
    given = inputs(3, 5, 7, batch=1, forcing=True) | {"fps": [1]}
    given["encoder_hidden_states"] = family_cases.noise(1, 512, tiny_wan.TEXT_DIM)
    given["encoder_hidden_states_image"] = family_cases.noise(1, 5, 16)
    family_cases.check(model, given, Grid(3, 5, 7), atol=5e-5)


@pytest.mark.compile
@pytest.mark.parametrize("forcing", [False, True])
def test_compiled(forcing):
    family_cases.compiled_is_eager(denoiser(), inputs(3, 5, 7, forcing=forcing))


@pytest.mark.parametrize("forcing", [False, True])
def test_a_foreign_processor_gets_raster_order(forcing):
    family_cases.foreign_layer_is_stock(denoiser(), inputs(3, 5, 7, forcing=forcing))


def test_a_causal_model_falls_back_in_its_own_order():
    """Asynchronous diffusion forcing: the mask over all pairs is never reordered, and the output is stock's bits."""
    model, given = denoiser(), inputs(4, 5, 7, forcing=True)
    free = family_checks.forward(model, given)
    model._set_ar_attention(2)
    stock = family_checks.forward(model, given)
    assert (stock - free).abs().max() > 1e-2
    tilewise.patch(model, family_checks.SMALL, steps=(0, 1))
    assert torch.equal(family_checks.forward(model, given), stock)
    (row,) = tilewise.summary(model).rows
    assert (row.kind, row.calls) == (FALLBACK, 2)
    assert "causal over groups of 2 frames" in row.reason
    tilewise.patch(model, family_checks.SMALL, steps=(0, 1), strict=True)
    with pytest.raises(tilewise.FallbackError, match="causal over groups of 2 frames"):
        family_checks.forward(model, given)
    tilewise.unpatch(model)


def pipeline(kind=SkyReelsV2Pipeline, scheduler=None):
    pipe = kind(
        tokenizer=tiny_wan.tiny_tokenizer(),
        text_encoder=tiny_wan.tiny_text_encoder(),
        vae=tiny_wan.tiny_vae(patch_size=None, in_channels=3, out_channels=3, scale_factor_spatial=2),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=denoiser(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **options):
    prompt = family_cases.noise(1, 16, tiny_wan.TEXT_DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # noise on the condition is drawn without the generator
        return pipe(
            prompt=None, prompt_embeds=prompt, negative_prompt_embeds=-prompt, height=16, width=32,
            guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(0), **options,
        ).frames  # fmt: skip


def kinds(pipe):
    return {row.kind: row.calls for row in tilewise.summary(pipe).rows}


def test_pipeline():
    pipe = pipeline()
    options = {"num_frames": 5, "num_inference_steps": 4}
    stock = run(pipe, **options)
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    torch.testing.assert_close(run(pipe, **options), stock, atol=1e-4, rtol=1e-4)
    assert kinds(pipe) == {DENSE_STEP: 1 * 2 * 2, SPARSE: 3 * 2 * 2}
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe, **options), stock)


@pytest.mark.parametrize("long", [False, True], ids=["one clip", "clip after clip"])
@pytest.mark.slow
def test_diffusion_forcing_pipeline(long):
    """Its own scheduler never moves: each frame has a copy. The step is where the noisiest frame is."""
    pipe = pipeline(
        SkyReelsV2DiffusionForcingPipeline,
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    options = {"num_frames": 9, "num_inference_steps": 8, "base_num_frames": 9, "overlap_history": None}
    clips = 1
    if long:
        options |= {"num_frames": 13, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
        clips = 2
    stock = run(pipe, **options)
    tilewise.patch(pipe, family_checks.FULL, strict=True, steps=(0.25, 1))
    torch.testing.assert_close(run(pipe, **options), stock, atol=1e-4, rtol=1e-4)
    assert kinds(pipe) == {DENSE_STEP: clips * 2 * 2 * 2, SPARSE: clips * 6 * 2 * 2}
    tilewise.unpatch(pipe)
    assert torch.equal(run(pipe, **options), stock)


def test_explain():
    told = tilewise.explain(denoiser(), height=544, width=960, frames=97, method="sta").rows[0]
    assert told.grid == "25×34×60"
    with pytest.raises(tilewise.ConfigError, match="height=540 must be a multiple of 16, the nearest is 544"):
        tilewise.explain(denoiser(), height=540, width=960, frames=97, method="sta")
