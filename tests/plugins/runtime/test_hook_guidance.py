"""Guidance by diffusers' hooks in the attention layers, hung before the patch or after it: what stock gives."""

from __future__ import annotations

from typing import Any

import family_checks
import image_checks
import pytest
import test_cogvideox
import test_hunyuan_video
import test_qwen_image
import test_sd3
import test_unet
import tiny_wan
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)

import tilewise
from tilewise.plugins.runtime.call_stats import FALLBACK, SPARSE

NAME = "guidance"
FULL = family_checks.FULL
SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}  # perturbed-attention guidance
ATTENTION = {"skip_attention": True, "skip_attention_scores": False, "skip_ff": False}


def wan() -> tuple[Any, dict[str, Any], str]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 12, 12, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator),
    }
    return image_checks.random_weights(tiny_wan.tiny_transformer()), inputs, "blocks"


def qwen() -> tuple[Any, dict[str, Any], str]:
    return test_qwen_image.tiny(), test_qwen_image.inputs((1, 7, 11)), "transformer_blocks"


def unet() -> tuple[Any, dict[str, Any], str]:
    return test_unet.unet_2d(), test_unet.inputs_of("2d", 12, 20), "mid_block.attentions.0.transformer_blocks"


def cogvideox() -> tuple[Any, dict[str, Any]]:
    model = test_cogvideox.denoiser()
    return model, test_cogvideox.inputs(model, (4, 8, 6))


def hang(model: Any, fqn: str, **what: Any) -> None:
    if fqn != "blocks":
        _apply_layer_skip_hook(model, LayerSkipConfig([0], fqn=fqn, **what), NAME)
        return
    # diffusers 0.42 does not know Wan's processor by its name of today.
    hook = AttentionProcessorSkipHook(
        lambda module, hidden_states, *_: hidden_states, what["skip_attention_scores"], 1.0
    )
    HookRegistry.check_if_exists_or_initialize(model.blocks[0].attn1).register_hook(hook, NAME)


def take_off(model: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(model).remove_hook(NAME, recurse=True)


@pytest.fixture(autouse=True)
def every_level(monkeypatch):
    """Tiny maps are sparse too."""
    monkeypatch.setattr("tilewise.plugins.config.MIN_MAP_TOKENS", 1)


@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize(
    ("make", "what"),
    # diffusers' own code for skipped attention fails on Qwen-Image.
    [(wan, SCORES), (wan, ATTENTION), (qwen, SCORES), (unet, SCORES), (unet, ATTENTION)],
    ids=["wan scores", "wan", "qwen scores", "unet scores", "unet"],
)
def test_skipped_attention(make, what, first):
    model, inputs, fqn = make()
    plain = family_checks.forward(model, inputs)
    hang(model, fqn, **what)
    stock = family_checks.forward(model, inputs)
    assert float((stock - plain).abs().max()) > 1e-3, "the hooks must do something"
    if first == "patch":
        take_off(model)
        tilewise.patch(model, FULL, steps=(0, 1))
        torch.testing.assert_close(family_checks.forward(model, inputs), plain, atol=1e-4, rtol=1e-4)
        hang(model, fqn, **what)
    else:
        tilewise.patch(model, FULL, steps=(0, 1))
    torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=1e-4, rtol=1e-4)
    reasons = tilewise.summary(model).fallbacks
    assert [count for why, count in reasons.items() if "AttentionScoreSkipFunctionMode" in why] == [1] * (
        what is SCORES
    )
    take_off(model)
    torch.testing.assert_close(family_checks.forward(model, inputs), plain, atol=1e-4, rtol=1e-4)
    assert tilewise.summary(model).fallbacks == reasons
    tilewise.unpatch(model)
    assert torch.equal(family_checks.forward(model, inputs), plain)


def blur(model: Any) -> None:
    config = SmoothedEnergyGuidanceConfig([0, 1])
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0, name=NAME)


SMOOTHED = {
    "wan": lambda: wan()[:2],
    "hunyuan": lambda: (test_hunyuan_video.tiny(), test_hunyuan_video.inputs(None, (3, 10, 22), (9, 4))),
    "cogvideox": cogvideox,
    "sd3": lambda: (test_sd3.tiny(), test_sd3.inputs(8, 10)),
}


@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("case", list(SMOOTHED))
def test_smoothed_energy_guidance_blurs_the_models_own_order(case, first):
    model, inputs = SMOOTHED[case]()
    plain = family_checks.forward(model, inputs)
    if first == "patch":
        tilewise.patch(model, FULL, steps=(0, 1), strict=True)
        blur(model)
        ours = family_checks.forward(model, inputs)
        tilewise.unpatch(model)
        stock = family_checks.forward(model, inputs)
    else:
        blur(model)
        stock = family_checks.forward(model, inputs)
        tilewise.patch(model, FULL, steps=(0, 1), strict=True)
        ours = family_checks.forward(model, inputs)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert float((stock - plain).abs().max()) > 1e-2, "the hooks must do something"
    take_off(model)
    torch.testing.assert_close(family_checks.forward(model, inputs), plain, atol=1e-4, rtol=1e-4)


def test_skipped_scores_in_dense_steps_and_with_strict():
    model, inputs, fqn = wan()
    hang(model, fqn, **SCORES)
    stock = family_checks.forward(model, inputs)
    with tilewise.patched(model, FULL, steps=(0, 0), strict=True):
        torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=1e-4, rtol=1e-4)
    with (
        tilewise.patched(model, FULL, steps=(0, 1), strict=True),
        pytest.raises(tilewise.FallbackError, match="torch function mode"),
    ):
        family_checks.forward(model, inputs)


def test_a_device_as_a_context_changes_nothing():
    model, inputs, _ = wan()
    tilewise.patch(model, FULL, steps=(0, 1), strict=True)
    with torch.device("cpu"):
        family_checks.forward(model, inputs)
    assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE}


@pytest.mark.compile
def test_compiled():
    """A graph breaks where a mode may answer a call; the others are whole again."""
    model, inputs, fqn = wan()
    hang(model, fqn, **SCORES)
    stock = family_checks.forward(model, inputs)
    tilewise.patch(model, FULL, steps=(0, 1))
    with torch.no_grad():
        out = torch.compile(model, backend="eager")(**inputs, return_dict=False)[0]
    torch.testing.assert_close(out, stock, atol=1e-4, rtol=1e-4)
    assert {row.kind for row in tilewise.summary(model).rows} == {SPARSE, FALLBACK}
    torch.compiler.reset()


# ── the older pipelines, which set processors while they run ──────────────────────────────────────────────────────────


def unet_pipeline() -> tuple[Any, dict[str, Any]]:
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPAGPipeline(
        vae=vae, unet=test_unet.unet_2d(), scheduler=DDIMScheduler(), **parts, requires_safety_checker=False,
        pag_applied_layers=["mid"],
    )  # fmt: skip
    embeds = {name: image_checks.random(1, 5, 32, seed=n) for n, name in enumerate(("prompt", "negative_prompt"))}
    return pipe, {f"{name}_embeds": embed for name, embed in embeds.items()} | {"height": 16, "width": 24}


def sd3_pipeline() -> tuple[Any, dict[str, Any]]:
    parts = {f"{kind}{n}": None for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipe = StableDiffusion3PAGPipeline(
        transformer=test_sd3.tiny(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, **parts,
        pag_applied_layers=["blocks.1"],
    )  # fmt: skip
    pipe.vae_scale_factor = 1
    call: dict[str, Any] = {"height": 16, "width": 20}
    for n, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        call[name] = image_checks.random(1, test_sd3.TEXT, test_sd3.TEXT_DIM, seed=n)
        call[name.replace("prompt", "pooled_prompt")] = image_checks.random(1, 8, seed=n + 2)
    return pipe, call


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["alone", "with CFG"])
@pytest.mark.parametrize("make", [unet_pipeline, sd3_pipeline], ids=["unet", "sd3"])
def test_pipelines_with_perturbed_attention(make, guidance):
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)

    def run(pag_scale: float = 3.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "guidance_scale": guidance, "pag_scale": pag_scale, "generator": generator}
        return pipe(**call, **options, output_type="latent").images

    stock = run()
    assert float((stock - run(0.0)).abs().max()) > 1e-3, "the guidance must do something"
    tilewise.patch(pipe, FULL, steps=(0, 1))
    for _ in range(2):  # it puts back what was there before each run
        torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)
    assert SPARSE in {row.kind for row in tilewise.summary(pipe).rows} and not tilewise.summary(pipe).skipped_layers
    torch.testing.assert_close(run(0.0), tilewise.unpatch(pipe) and run(0.0), atol=1e-4, rtol=1e-4)
    assert torch.equal(run(), stock)
