"""Cosmos 1.0, 2 and 2.5 through the checks that every family must pass, and what is theirs alone."""

import family_cases
import family_checks
import pytest
import tiny_wan
import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.call_stats import DENSE_STEP, SPARSE

TEXT_DIM = 32
VERSIONS = {
    "1.0": {"extra_pos_embed_type": "learnable"},
    "2": {"extra_pos_embed_type": None, "in_channels": 5},  # one more channel says which frames are conditions
    "2.5": {
        "extra_pos_embed_type": None,
        "in_channels": 5,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 48,
        "encoder_hidden_states_channels": TEXT_DIM,
    },
    "2.5 transfer": {
        "extra_pos_embed_type": None,
        "in_channels": 5,
        "controlnet_block_every_n": 2,
        "img_context_dim_in": 16,
        "img_context_dim_out": 32,
    },
}


def denoiser(version="2", **overrides):
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "adaln_lora_dim": 8,
        "max_size": (16, 48, 48),
        "concat_padding_mask": False,  # one more channel, which stock resizes by torchvision
    }
    return family_cases.weights(CosmosTransformer3DModel(**{**config, **VERSIONS[version], **overrides}))


def inputs(version, t, h, w, batch=2, per_frame=False):
    given = {
        "hidden_states": family_cases.noise(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": family_cases.noise(batch, 10, 48 if version == "2.5" else TEXT_DIM, seed=1),
        "fps": 16,
    }
    if version != "1.0":
        given["condition_mask"] = torch.zeros(batch, 1, t, 2 * h, 2 * w)
        given["condition_mask"][:, :, 0] = 1
    if version == "2.5 transfer":
        controls = [family_cases.noise(batch, t * h * w, 32, seed=seed) for seed in (3, 4)]
        given["block_controlnet_hidden_states"] = controls
        given["encoder_hidden_states"] = (given["encoder_hidden_states"], family_cases.noise(batch, 4, 16, seed=5))
    if per_frame:
        given["timestep"] = torch.linspace(0.9, 0.1, batch * t).view(batch, 1, t, 1, 1)
    return given


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 11)])
def test_cosmos(grid, version):
    family_cases.check(denoiser(version), inputs(version, *grid), Grid(*grid), atol=5e-5)


@pytest.mark.parametrize("version", ["2", "2.5 transfer"])
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 5, 11)])
def test_a_timestep_a_frame(grid, version):
    family_cases.check(denoiser(version), inputs(version, *grid, per_frame=True), Grid(*grid), atol=5e-5)


@pytest.mark.parametrize("grid", [(1, 6, 7), (4, 1, 9), (4, 1, 1)])
def test_full_window_on_thin_grids(grid):
    """One frame: the modulation is one row for all tokens, in no memory of their own."""
    family_checks.full_window_is_dense(denoiser(), inputs("2", *grid, per_frame=True), Grid(*grid), atol=5e-5)


@pytest.mark.compile
@pytest.mark.parametrize("per_frame", [False, True])
def test_compiled(per_frame):
    family_cases.compiled_is_eager(denoiser(num_layers=2), inputs("2", 3, 5, 7, per_frame=per_frame))


def test_a_foreign_processor_gets_raster_order():
    family_cases.foreign_layer_is_stock(denoiser(), inputs("2", 3, 5, 7, per_frame=True))


def test_inputs_are_left_as_they_were():
    model, given = denoiser("2.5 transfer"), inputs("2.5 transfer", 3, 5, 7, per_frame=True)
    before = [x.clone() for x in (given["timestep"], *given["block_controlnet_hidden_states"])]
    with tilewise.patched(model, family_checks.SMALL, steps=(0, 1), strict=True):
        family_checks.forward(model, given)
    after = (given["timestep"], *given["block_controlnet_hidden_states"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_bare_denoiser_goes_by_its_noise_level():
    model = denoiser()
    tilewise.patch(model, family_checks.SMALL)  # steps 0.25 to 1
    for level in (0.99, 0.8, 0.7, 0.1):
        family_checks.forward(model, inputs("2", 3, 5, 7) | {"timestep": torch.full((2,), level)})
    assert {row.kind: row.calls for row in tilewise.summary(model).rows} == {DENSE_STEP: 2 * 3, SPARSE: 2 * 3}


class Harmless(torch.nn.Module):
    """In the place of the guard model, which is large: nothing is unsafe."""

    device = torch.device("cpu")
    dtype = torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def pipeline(kind):
    first = kind is CosmosTextToWorldPipeline
    sigmas = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5} if first else {}
    if first:
        vae = AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8),
            decode_block_out_channels=(8, 8, 8),
            attention_resolutions=(8,),
            resolution=32,
            num_layers=1,
            patch_size=2,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )
    else:
        vae = tiny_wan.tiny_vae(patch_size=None, in_channels=3, out_channels=3, scale_factor_spatial=2)
    pipe = kind(
        tokenizer=tiny_wan.tiny_tokenizer(),
        text_encoder=tiny_wan.tiny_text_encoder(),
        vae=vae,
        scheduler=EDMEulerScheduler(**sigmas) if first else FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        transformer=denoiser("1.0" if first else "2"),
        safety_checker=Harmless(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [CosmosTextToWorldPipeline, Cosmos2VideoToWorldPipeline])
def test_pipeline(kind):
    pipe = pipeline(kind)
    prompt = family_cases.noise(1, 16, TEXT_DIM)
    extra = {}
    if kind is Cosmos2VideoToWorldPipeline:
        extra["image"] = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))

    def run():
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=-prompt, height=32, width=48, num_frames=5, guidance_scale=3.0,
            num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0), **extra,
        ).frames  # fmt: skip

    stock = run()
    tilewise.patch(pipe, family_checks.FULL, strict=True)
    # Where noise is of size 80, so are the differences of rounding.
    torch.testing.assert_close(run(), stock, atol=1e-3, rtol=1e-3)
    assert {row.kind: row.calls for row in tilewise.summary(pipe).rows} == {DENSE_STEP: 1 * 2 * 3, SPARSE: 3 * 2 * 3}
    grid = Grid(2, 4, 6) if kind is CosmosTextToWorldPipeline else Grid(3, 8, 12)
    assert pipe.transformer._tilewise.state.grid == grid
    tilewise.unpatch(pipe)
    assert torch.equal(run(), stock)


def test_explain():
    told = tilewise.explain(denoiser("1.0"), height=704, width=1280, frames=121, method="sta").rows[0]
    assert told.grid == "16×44×80"
    told = tilewise.explain(denoiser("2"), height=704, width=1280, frames=93, method="sta").rows[0]
    assert told.grid == "24×44×80"
    with pytest.raises(tilewise.ConfigError, match="frames=92 must be 4·k \\+ 1, the nearest is 93"):
        tilewise.explain(denoiser("2"), height=704, width=1280, frames=92, method="sta")
    image = pipeline(Cosmos2TextToImagePipeline)
    assert tilewise.explain(image, height=64, width=96, frames=1, method="sta").rows[0].grid == "1×16×24"
    with pytest.raises(tilewise.ConfigError, match="frames=5 must be 1: it makes images"):
        tilewise.explain(image, height=64, width=96, frames=5, method="sta")
