"""Wan VACE: control blocks beside the main ones, through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import tiny_wan
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel
from test_wan_fused import Everywhere

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.runtime.call_stats import DENSE_LAYER, DENSE_STEP, SPARSE

CONTROL = 2 * tiny_wan.Z_CHANNELS + 4  # inactive and reactive latents, and 2 × 2 pixels of mask


def denoiser(layers=3, vace_layers=(0, 2), num_attention_heads=2):
    return family_cases.weights(
        WanVACETransformer3DModel(
            num_attention_heads=num_attention_heads,
            attention_head_dim=16,
            in_channels=tiny_wan.Z_CHANNELS,
            out_channels=tiny_wan.Z_CHANNELS,
            text_dim=tiny_wan.TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
            rope_max_seq_len=64,
            vace_layers=list(vace_layers),
            vace_in_channels=CONTROL,
        )
    )


def inputs(t, h, w, batch=2, scale=(0.7, 1.3)):
    return {
        "hidden_states": family_cases.noise(batch, tiny_wan.Z_CHANNELS, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": family_cases.noise(batch, 16, tiny_wan.TEXT_DIM, seed=1),
        "control_hidden_states": family_cases.noise(batch, CONTROL, t, 2 * h, 2 * w, seed=2),
        "control_hidden_states_scale": torch.tensor(scale),
    }


@pytest.mark.parametrize("vace_layers", [(0, 2), (0, 1)], ids=["a hint after the last block", "none"])
@pytest.mark.parametrize("grid", [(5, 8, 8), (3, 5, 11)])
def test_vace(grid, vace_layers):
    model = denoiser(vace_layers=vace_layers)
    family_cases.check(model, inputs(*grid), Grid(*grid), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_full_window_on_thin_grids(grid):
    family_checks.full_window_is_dense(denoiser(), inputs(*grid), Grid(*grid), atol=5e-5)


def test_control_is_not_ignored_and_blocks_choose_control_blocks_too():
    model, given = denoiser(), inputs(3, 6, 6)
    other = {**given, "control_hidden_states": -given["control_hidden_states"]}
    assert (family_checks.forward(model, given) - family_checks.forward(model, other)).abs().max() > 1e-2
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), blocks="1:"):
        family_checks.forward(model, given)
        rows = {row.kind: row.calls for row in tilewise.summary(model).rows}
    # Main blocks 1 and 2 and the control block beside 2; main block 0 and the control block beside it.
    assert rows == {SPARSE: 3, DENSE_LAYER: 2}


@pytest.mark.parametrize("layer", [1, 3], ids=["main", "control"])
def test_a_foreign_processor_gets_raster_order(layer):
    family_cases.foreign_layer_is_stock(denoiser(), inputs(3, 5, 7), layer)


@pytest.mark.compile
def test_compiled():
    family_cases.compiled_is_eager(denoiser(layers=2, vace_layers=(0,)), inputs(3, 5, 7, scale=(0.7,)))


def test_the_main_blocks_are_fused_as_wans_are():
    """Their class is Wan's own; the control blocks' is not, and stays stock."""
    model, given = denoiser(), inputs(3, 5, 7)
    stock = family_checks.forward(model, given)
    handles = family_of(model).fuse(model, Everywhere())
    assert [handle.module for handle in handles] == list(model.blocks)
    torch.testing.assert_close(family_checks.forward(model, given), stock, atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert torch.equal(family_checks.forward(model, given), stock)


def pipeline():
    pipe = WanVACEPipeline(
        tokenizer=tiny_wan.tiny_tokenizer(),
        text_encoder=tiny_wan.tiny_text_encoder(),
        vae=tiny_wan.tiny_vae(patch_size=None, in_channels=3, out_channels=3, scale_factor_spatial=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=denoiser(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline():
    pipe = pipeline()
    prompt = family_cases.noise(1, 16, tiny_wan.TEXT_DIM)

    def run():
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=-prompt, height=20, width=28, num_frames=5, guidance_scale=3.0,
            num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    rows = {row.kind: row.calls for row in tilewise.summary(pipe).rows}
    assert rows == {DENSE_STEP: 1 * 2 * 5, SPARSE: 3 * 2 * 5}  # steps × (cond, uncond) × layers
    assert pipe.transformer._tilewise.state.grid == Grid(3, 5, 7)
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_explain():
    told = tilewise.explain(pipeline(), height=20, width=28, frames=5, method="sta").rows[0]
    assert (told.grid, told.sparse_blocks) == ("3×5×7", "0-2")
    with pytest.raises(tilewise.ConfigError, match="height=21 must be a multiple of 4, the nearest is 20"):
        tilewise.explain(pipeline(), height=21, width=28, frames=5, method="sta")
