"""Guidance by diffusers' hooks in the attention layers, hung before the patch or after it: what stock gives."""

from __future__ import annotations

from typing import Any

import family_checks
import image_checks
import pytest
import test_qwen_image
import test_unet
import tiny_wan
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, _apply_layer_skip_hook

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
