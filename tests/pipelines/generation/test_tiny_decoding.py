"""Clips and streams that a tiny autoencoder decodes: its frames, what makes them again, and files that are not for the model."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_autoencoders import fitting_pipeline, plain_decode, published_weights

import tilewise
from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import GenerateSettings, TinyChoice
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.state import StreamState
from tilewise.plugins.autoencoders.tiny_layout import tiny_decoder
from tilewise.plugins.autoencoders.tiny_streaming import TinyStreamingDecoder

PROMPT = "a red circle moving right"
SMALL = {"height": 32, "width": 48, "frames": 9, "steps": 1, "guidance": 1.0, "max_sequence_length": 16, "fps": 8}
RECIPE = CausalRecipe(chunk=2, window=6, sink=2, height=32, width=48, fps=8, timesteps=(1000, 500))


@pytest.fixture(scope="module")
def pipe():
    pipe = fitting_pipeline()

    def decode(*_, **__):
        raise AssertionError("the pipeline's own VAE decodes")

    pipe.vae.decode = decode
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def file(folder):
    save_file(published_weights(1), folder / "taew2_1.safetensors")
    return folder / "taew2_1.safetensors"


def settings_for(pipe, decode, **changes) -> GenerateSettings:
    return resolve_settings(pipe, PROMPT, method="dense", decode=decode, **{**SMALL, **changes})


def stream(pipe, decode, **kwargs):
    return tilewise.stream(pipe, PROMPT, **{"recipe": RECIPE, "max_sequence_length": 16, "decode": decode, **kwargs})


def pixels(video: torch.Tensor) -> np.ndarray:
    return ((video[0] / 2 + 0.5) * 255).round().byte().permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("method", ["dense", "sta"])
def test_a_clip_is_the_decoded_latents_of_the_pipeline(pipe, file, suffix, method):
    if suffix == "pth":
        torch.save(published_weights(1), file.with_suffix(".pth"))
    phases = []
    settings = dataclasses.replace(
        settings_for(pipe, f"tiny={file.with_suffix('.' + suffix)}"), method=tilewise.resolve(method)
    )
    clip = generate(pipe, settings, lambda *call: phases.append(call))
    with tilewise.patched(pipe, settings.method):
        latents = pipe(
            PROMPT, height=32, width=48, num_frames=9, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=16,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip
    wanted = pixels(plain_decode(published_weights(1), latents))  # normalised, as they are
    assert clip.frames.shape == wanted.shape == (9, 32, 48, 3) and wanted.std() > 20
    assert np.abs(clip.frames.astype(int) - wanted).max() <= 1 and (clip.frames == wanted).mean() > 0.99
    assert phases[-2:] == [("decode", 0, 1), ("decode", 1, 1)] and clip.seconds["decode"] > 0
    assert (clip.summary is None) == (method == "dense")


def test_settings_name_the_file_and_its_hash(pipe, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    settings = settings_for(pipe, f"tiny={file.name}")
    assert re.fullmatch(rf"tiny={re.escape(str(file))}@sha256:[0-9a-f]{{64}}", settings.decode)
    again = GenerateSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings == settings_for(pipe, settings.decode)
    before = {name: value for name, value in settings_for(pipe, "vae").to_dict().items() if name != "decode"}
    assert GenerateSettings.from_dict(before).decode == "vae"  # of a clip from before there was a choice


@pytest.mark.parametrize("said", ["", "tiny", "tiny=", "tiny= ", "big=x.pth", "x.pth", None, 3])
def test_what_decode_does_not_take(said):
    with pytest.raises(tilewise.ConfigError, match="decode takes vae"):
        TinyChoice.parse(said)


def refused(pipe, decode, error, message):
    """By all that take it, before anything runs."""
    with pytest.raises(error, match=message):
        settings_for(pipe, decode)
    with pytest.raises(error, match=message):
        stream(pipe, decode)
    assert not tilewise.is_patched(pipe)
    settings = dataclasses.replace(settings_for(pipe, "vae"), decode=decode)
    phases = []
    with pytest.raises(error, match=message):
        generate(pipe, settings, lambda *call: phases.append(call))
    assert phases == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 6}, "latents of 6 channels, 8 × 8 pixels and 4 frames; those of this WanPipeline have 4 channels, 8 × 8"),
        ({"growth": (2, 2, 2)}, "8 × 8 pixels and 8 frames"),
        ({"patch": 2, "wide": True}, "16 × 16 pixels and 4 frames"),
    ],
)  # fmt: skip
def test_latents_of_another_shape_are_refused(pipe, folder, changes, message):
    save_file(published_weights(1, **changes), folder / "other.safetensors")
    refused(pipe, f"tiny={folder / 'other.safetensors'}", tilewise.ConfigError, message)


def test_a_file_that_has_changed_is_refused(pipe, folder):
    file = folder / "changed.safetensors"
    save_file(published_weights(1), file)
    settings = settings_for(pipe, f"tiny={file}")
    save_file(published_weights(2), file)
    refused(
        pipe,
        settings.decode,
        tilewise.ConfigError,
        r"has changed: .*give decode as tiny=.*/changed\.safetensors to use",
    )
    assert settings_for(pipe, f"tiny={file}").decode != settings.decode


def test_other_files_are_refused(pipe, folder):
    for name in ("taehv.safetensors", "TAECVX.pth"):  # latents of the same shape
        (save_file if name.endswith("safetensors") else torch.save)(published_weights(1), folder / name)
        refused(pipe, f"tiny={folder / name}", tilewise.ConfigError, "is for another model, by its name")
    refused(pipe, f"tiny={folder / 'nowhere.pth'}", ModelError, "there is no file .*nowhere.pth of a tiny autoencoder")
    refused(pipe, f"tiny={folder}", ModelError, "there is no file")
    (folder / "notes.txt").write_text("")
    refused(pipe, f"tiny={folder / 'notes.txt'}", ModelError, r"ends in none of \.safetensors")
    torch.save({"generator": published_weights(1)}, folder / "nested.pth")
    refused(pipe, f"tiny={folder / 'nested.pth'}", ModelError, "it holds generator, which is no tensor")
    torch.save({**published_weights(1), "code": re.compile}, folder / "code.pth")
    refused(pipe, f"tiny={folder / 'code.pth'}", ModelError, "can run code")
    save_file({"decoder.1.weight": torch.zeros(6, 4, 3, 3)}, folder / "part.safetensors")
    refused(
        pipe,
        f"tiny={folder / 'part.safetensors'}",
        ModelError,
        r"there is no decoder\.7\.conv\.weight.*as it was published",
    )


def test_other_families_are_refused(file):
    pipe = fitting_pipeline()
    pipe.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(
        tilewise.UnsupportedModelError, match=r"no tiny autoencoder is known for .* with AutoencoderKL;"
    ):
        settings_for(pipe, f"tiny={file}")
    with pytest.raises(tilewise.UnsupportedModelError, match="Leave decode out"):
        stream(pipe, f"tiny={file}")


def test_a_stream_is_decoded_bit_for_bit_as_a_whole_clip(pipe, file):
    with stream(pipe, f"tiny={file}", seconds=27 / 8) as video:
        chunks = list(video)
    assert [len(chunk.frames) for chunk in chunks] == [5, 8, 8, 6]
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    whole = TinyStreamingDecoder(tiny_decoder(published_weights(1))).decode(latents)
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), pixels(whole)[:27])
    assert not tilewise.is_patched(pipe)


def test_the_state_of_a_stream_goes_on_with_the_same_decoder_only(pipe, file, folder):
    options = {"seconds": 21 / 8, "seed": 3}
    with stream(pipe, f"tiny={file}", **options) as video:
        next(video)
        video.state_dict().save(folder / "state.safetensors")
        wanted = list(video)
    state = StreamState.load(folder / "state.safetensors")
    with stream(pipe, f"tiny={file}", **options) as video:
        video.load_state_dict(state)
        for got, chunk in zip(video, wanted, strict=True):
            assert torch.equal(got.latents, chunk.latents) and np.array_equal(got.frames, chunk.frames)
    save_file(published_weights(2), folder / "second.safetensors")
    for decode in ("vae", f"tiny={folder / 'second.safetensors'}"):
        with (
            stream(pipe, decode, **options) as other,
            pytest.raises(tilewise.ConfigError, match="state's decoder is tiny"),
        ):
            other.load_state_dict(state)
