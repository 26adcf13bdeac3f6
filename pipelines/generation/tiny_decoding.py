"""Decode a pipeline's latents with a tiny autoencoder in place of its VAE."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.generation.settings import OWN_VAE, GenerateSettings, TinyChoice
from tilewise.pipelines.latent_spaces.base import LatentSpace, latent_spaces
from tilewise.pipelines.loading.tiny_file import TinyFile, read_tiny_file
from tilewise.plugins.autoencoders.tiny_streaming import TinyStreamingDecoder
from tilewise.plugins.diffusers_compat import execution_device, unwrapped, wan_vae_modules
from tilewise.plugins.errors import ConfigError, UnsupportedModelError

# Published for VAEs whose latents are of the same shape as Wan 2.1's and mean something else.
_OF_OTHER_MODELS = re.compile(r"taehv|taecvx|taeos1_3", re.IGNORECASE)


def resolve_decode(pipe: Any, said: str) -> str:
    """What `GenerateSettings.decode` says, checked for a pipeline, with the file's absolute path and SHA-256.

    pipe: may be a skeleton. Raises as `read_fitting`.
    """
    choice = TinyChoice.parse(said)
    if choice is None:
        return OWN_VAE
    found = read_fitting(pipe, choice)
    return str(TinyChoice(found.path, found.sha256))


def tiny_decoder_of(
    pipe: Any, said: str, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> TinyStreamingDecoder | None:
    """The decoder for one clip that `GenerateSettings.decode` names; None for the pipeline's own VAE.

    device, dtype: default: those that the VAE runs on and in. Raises as `read_fitting`.
    """
    choice = TinyChoice.parse(said)
    if choice is None:
        return None
    found = read_fitting(pipe, choice)
    device = execution_device(pipe, pipe.vae.device) if device is None else device
    return TinyStreamingDecoder(found.decoder.to(device, dtype or pipe.vae.dtype), found.sha256)


def read_fitting(pipe: Any, choice: TinyChoice) -> TinyFile:
    """The file of a tiny autoencoder, which must be one for a pipeline's latents.

    Raises:
        UnsupportedModelError: a pipeline whose latents no tiny autoencoder is known for.
        ModelError: the file is missing or none.
        ConfigError: it is for latents of another shape or another model, or is not the file that `choice` means.
    """
    space = _space_of(pipe)
    found = read_tiny_file(choice.path)
    if choice.sha256 and choice.sha256 != found.sha256:
        raise ConfigError(
            f"{found.path} has changed: its SHA-256 is {found.sha256[:12]}…, and that of the clip's decoder was "
            f"{choice.sha256[:12]}…. Put that file back, or give decode as tiny={found.path} to use it as it is now"
        )
    shape = found.decoder.shape
    own = (space.channels(pipe.vae), *space.factors(pipe))
    tiny = (shape.channels, shape.spatial, shape.temporal)
    if own != tiny:
        raise ConfigError(
            f"{found.path} decodes latents of {_words(*tiny)}; those of this {type(pipe).__name__} have {_words(*own)}. "
            "taew2_1 is for Wan 2.1 and Wan 2.2 14B, taew2_2 for Wan 2.2 5B"
        )
    if _OF_OTHER_MODELS.fullmatch(found.path.stem):
        raise ConfigError(
            f"{found.path} is for another model, by its name: {found.path.stem} does not decode Wan's latents; taew2_1 does"
        )
    return found


def decode_latents(
    pipe: Any, decoder: TinyStreamingDecoder, latents: torch.Tensor, settings: GenerateSettings
) -> NDArray[np.float32]:
    """What a pipeline's call gave with ``output_type="latent"``, as frames (T, H, W, 3) in 0 … 1."""
    space = _space_of(pipe)
    latents = space.unpacked(pipe, latents, space.shape(pipe, settings.height, settings.width, settings.frames))
    weight = next(decoder.decoder.parameters())
    frames = []
    for latent in latents.split(1, 2):  # so that the frames of one latent alone are on the device
        video = decoder.decode(latent.to(weight.device, weight.dtype))
        frames.append((video[0].float() / 2 + 0.5).permute(1, 2, 3, 0).cpu().numpy())
    return np.concatenate(frames)


def _space_of(pipe: Any) -> LatentSpace:
    vae, space = getattr(pipe, "vae", None), latent_spaces().get(type(pipe).__name__)
    if space is None or vae is None or type(unwrapped(vae)) is not wan_vae_modules().autoencoder:
        raise UnsupportedModelError(
            f"decode: no tiny autoencoder is known for the latents of {type(pipe).__name__} with {type(vae).__name__}; they are "
            "for AutoencoderKLWan in WanPipeline and SkyReelsV2Pipeline. Leave decode out, or give decode=vae"
        )
    return space


def _words(channels: int, spatial: int, temporal: int) -> str:
    return f"{channels} channels, {spatial} × {spatial} pixels and {temporal} frames"
