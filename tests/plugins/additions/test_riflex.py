"""RIFLEx: rotary tables against the frequency changed in the model's own code, in Wan, HunyuanVideo and CogVideoX."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_cogvideox
import test_hunyuan_video
import tiny_wan
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from family_checks import forward, traces
from tiny_unets import tiny_unet

import tilewise
from tilewise.plugins.additions.riflex import frequencies, intrinsic, riflex
from tilewise.plugins.patching import patches_of

FRAMES, NATIVE = 24, 3


def wan(frames: int) -> tuple[Any, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 16, tiny_wan.TEXT_DIM, generator=generator)
    sample = torch.randn(1, 4, frames, 8, 10, generator=generator)
    inputs = {"hidden_states": sample, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    return tiny_wan.tiny_transformer(), inputs


def hunyuan(frames: int) -> tuple[Any, dict[str, Any]]:
    model = test_hunyuan_video.tiny()
    return model, test_hunyuan_video.inputs(None, (frames, 8, 12), (9,))


def cogvideox(frames: int) -> tuple[Any, dict[str, Any]]:
    model = test_cogvideox.denoiser("rotary", attention_head_dim=64)
    inputs = test_cogvideox.inputs(model, (frames, 4, 5))
    inputs["image_rotary_emb"] = cog_tables(frames)
    return model, inputs


def cog_tables(frames: int) -> Any:
    return get_3d_rotary_pos_embed(64, ((0, 0), (4, 5)), (4, 5), frames)


def rotated(
    model: Any, theta: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables with all channels of time made anew from frequencies, token by token."""
    out = []
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        table = table.clone()
        flat = table.view(-1, table.shape[-1])
        each = len(flat) // FRAMES
        for token in range(len(flat)):
            for j, turn in enumerate(theta.tolist()):
                flat[token, 2 * j] = flat[token, 2 * j + 1] = function(token // each * turn)
        out.append(table)
    return tuple(out)


@pytest.mark.parametrize(("make", "k"), [(wan, None), (wan, 1), (hunyuan, 1), (cogvideox, None), (cogvideox, 1)])
def test_one_frequency_is_slower(make, k):
    model, inputs = make(FRAMES)
    before, stock = traces(model), forward(model, inputs)
    theta = frequencies(model).clone()
    at = (k or {cogvideox: 2}.get(make) or intrinsic(theta, NATIVE) + 1) - 1
    theta[at] = min(theta[at], 0.9 * 2 * math.pi / FRAMES)
    tilewise.patch(model, "dense", add={"name": "riflex", "native": NATIVE, "k": k})
    got = forward(model, inputs)
    (note,) = (note for note in tilewise.summary(model).notes if "riflex" in note)
    assert f"slowed frequency {at + 1}: {FRAMES} latent frames, {NATIVE} in training" in note
    tilewise.unpatch(model)
    assert torch.equal(forward(model, inputs), stock) and traces(model) == before
    if make is cogvideox:
        want = forward(model, {**inputs, "image_rotary_emb": rotated(model, theta, inputs["image_rotary_emb"])})
    else:
        handle = model.rope.register_forward_hook(lambda rope, args, out: rotated(model, theta, out))
        want = forward(model, inputs)
        handle.remove()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert float((want - stock).abs().max()) > 1e-4


@pytest.mark.parametrize("make", [wan, hunyuan, cogvideox])
def test_clips_no_longer_than_in_training_stay_as_they_are(make):
    model, inputs = make(NATIVE)
    stock = forward(model, inputs)
    with tilewise.patched(model, "dense", add=f"riflex:native={NATIVE}"):
        assert torch.equal(forward(model, inputs), stock)
    with tilewise.patched(model, tilewise.STA(window=(9, 9, 9)), steps=(0, 1), add="riflex:native=2", strict=True):
        forward(model, inputs)
        assert tilewise.summary(model).ran


def test_published_numbers():
    """HunyuanVideo: k 4, with a period of 50 latent frames; CogVideoX: k 2, of 20."""
    for base, channels, k, period in ((256.0, 16, 4, 50), (10_000.0, 16, 2, 20)):
        theta = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        assert round(2 * math.pi / float(theta[k - 1])) == period
        changed = riflex(theta, 1, 66, k)
        assert float(changed[k - 1]) == pytest.approx(0.9 * 2 * math.pi / 66)
        assert torch.equal(changed != theta, torch.arange(channels // 2) == k - 1)


def test_the_training_length_is_the_pipelines(tiny_pipe):
    tilewise.patch(tiny_pipe, "dense", add="riflex")
    assert patches_of(tiny_pipe)["transformer"].config.additions[0].native == 41  # 81 frames, two to a latent one
    tilewise.unpatch(tiny_pipe)


def test_what_cannot_be_is_refused(tiny_pipe):
    with pytest.raises(tilewise.UnsupportedModelError, match="riflex slows a rotary frequency"):
        tilewise.patch(tiny_unet(), "dense", add="riflex")
    with pytest.raises(tilewise.ConfigError, match=r"bare WanTransformer3DModel does not say.*give native"):
        tilewise.patch(tiny_pipe.transformer, "dense", add="riflex")
    with pytest.raises(tilewise.ConfigError, match="k=99, but transformer has"):
        tilewise.patch(tiny_pipe, "dense", add="riflex:k=99")
    with pytest.raises(tilewise.UnsupportedModelError, match="riflex slows"):  # learned positions
        tilewise.patch(test_cogvideox.denoiser("sincos"), "dense", add="riflex:native=3")
