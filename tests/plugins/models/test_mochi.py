"""Mochi: padding of prompts left out sample by sample, through the checks that every family must pass."""

import family_cases
import family_checks
import pytest
import tiny_wan
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.patching import patches_of
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

TEXT, TEXT_DIM = 9, 16
# Lengths of the two prompts of a batch: as long as they can be, shorter, different, none.
PROMPTS = {"full": (TEXT, TEXT), "padded": (5, 5), "each its own": (7, 2), "one empty": (0, TEXT)}


def denoiser(**overrides):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 4,
        "max_sequence_length": TEXT,
    }
    model = family_cases.weights(MochiTransformer3DModel(**{**config, **overrides}))
    with torch.no_grad():
        model.pos_frequencies.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model


def inputs(t, h, w, prompts=(TEXT, TEXT)):
    batch = len(prompts)
    return {
        "hidden_states": family_cases.noise(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": family_cases.noise(batch, TEXT, TEXT_DIM, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.arange(TEXT)[None] < torch.tensor(prompts)[:, None],
    }


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 11)])
def test_mochi(grid, prompts):
    given = inputs(*grid, prompts)
    family_cases.check(denoiser(), given, Grid(*grid, text=TEXT), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9)])
def test_full_window_on_thin_grids(grid):
    family_checks.full_window_is_dense(denoiser(), inputs(*grid, (6, 3)), Grid(*grid, text=TEXT), atol=5e-5)


def test_dense_steps_give_stocks_bits_up_to_order():
    model, given = denoiser(), inputs(3, 5, 7, (7, 2))
    stock = family_checks.forward(model, given)
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 0)):
        torch.testing.assert_close(family_checks.forward(model, given), stock, atol=2e-5, rtol=2e-5)
        assert {row.kind: row.calls for row in tilewise.summary(model).rows} == {DENSE_STEP: 2 * 3}


def test_prompts_of_one_length_share_a_plan():
    model = denoiser()
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        for lengths in ((7, 2), (2, 7), (7, 7)):
            family_checks.forward(model, inputs(3, 5, 7, lengths))
        (patch,) = patches_of(model).values()
        assert len(patch.state.plans.plans) == 2


def test_a_foreign_processor_gets_raster_order():
    family_cases.foreign_layer_is_stock(denoiser(), inputs(3, 5, 7, (7, 2)))


@pytest.mark.compile
def test_compiled():
    """Stock breaks graphs where it looks for the padding; so do we, and nowhere else does it matter."""
    model, given = denoiser(num_layers=2), inputs(3, 5, 7, (7, 2))
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True), torch.no_grad():
        eager = model(**given).sample
        torch.compiler.reset()
        out = torch.compile(model, backend="eager")(**given).sample
        torch.testing.assert_close(out, eager, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_timesteps_count_from_noise():
    """A bare denoiser goes by them: 10 is nearly pure noise."""
    model = denoiser()
    tilewise.patch(model, family_checks.SMALL)  # steps 0.25 to 1
    for timestep in (10.0, 200.0, 300.0, 990.0):
        family_checks.forward(model, inputs(3, 5, 7) | {"timestep": torch.full((2,), timestep)})
    # Two calls a layer: one a sample.
    assert {row.kind: row.calls for row in tilewise.summary(model).rows} == {DENSE_STEP: 2 * 6, SPARSE: 2 * 6}
    tilewise.unpatch(model)


def pipeline(channels=4):
    encoder = T5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLMochi(
        latent_channels=channels,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=T5EncoderModel(encoder).eval(),
        tokenizer=tiny_wan.tiny_tokenizer(),
        transformer=denoiser(in_channels=channels),
        force_zeros_for_empty_prompt=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline():
    """Guidance is one batch of two prompts of different lengths, the empty one without any token."""
    pipe = pipeline()

    def run():
        return pipe(
            "a red circle moving right", negative_prompt="", height=80, width=112, num_frames=13, guidance_scale=3.0,
            num_inference_steps=4, max_sequence_length=TEXT, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {DENSE_STEP: 1 * 2 * 3, SPARSE: 3 * 2 * 3}
    assert pipe.transformer._tilewise.state.grid == Grid(3, 5, 7, text=TEXT)
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_explain():
    told = tilewise.explain(denoiser(max_sequence_length=256), height=480, width=848, frames=163, method="sta")
    assert told.rows[0].grid == "28×30×53 + 256 text"
    assert not told.notes
    with pytest.raises(tilewise.ConfigError, match=r"height=488 must be a multiple of 16.*frames=160 must be 6·k"):
        tilewise.explain(denoiser(), height=488, width=848, frames=160, method="sta")
