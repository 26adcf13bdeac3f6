"""The latents of pipelines that can make windows: those of ``latent_spaces``, and some whose schedule no second stage enters."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, latent_spaces
from tilewise.pipelines.latent_spaces.ltx import LTXLatents

# Pipelines that begin with a picture or a few frames, and those that have the same latents without one.
ALIKE = {"WanImageToVideoPipeline": "WanPipeline", "WanVACEPipeline": "WanPipeline"}


class CogVideoXLatents(LatentSpace):
    """Frames come before channels."""

    pipelines = ("CogVideoXPipeline",)
    one_batch = True

    def refuses(self, pipe: Any) -> str | None:
        # The pipeline makes more latent frames than it was asked for, and leaves the first ones out in the end.
        return "its tokens have two latent frames each" if pipe.transformer.config.patch_size_t else None

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2)

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        return latents.transpose(1, 2)


class LTX2Latents(LTXLatents):
    """Packed as LTX-Video's; the call returns them in the VAE's own units, and with sound, which takes part in each window."""

    pipelines = ("LTX2Pipeline",)
    left_out = "sound, which is made anew with each window and left out"

    def finished(self, pipe: Any, out: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        mean, std = self.statistics(pipe.vae, out)
        return (out - mean) / std


class AnimateDiffLatents(LatentSpace):
    """A latent for each frame, of Stable Diffusion's VAE."""

    pipelines = ("AnimateDiffPipeline",)
    one_batch = True

    def factors(self, pipe: Any) -> tuple[int, int]:
        return pipe.vae_scale_factor, 1

    def decode_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents[0].transpose(0, 1), return_dict=False)[0].transpose(0, 1)[None]

    def encode_vae(self, vae: Any, video: torch.Tensor) -> torch.Tensor:
        return super().encode_vae(vae, video[0].transpose(0, 1)).transpose(0, 1)[None]


def window_spaces() -> dict[str, LatentSpace]:
    """Pipeline class name → its latent space."""
    # Those that mix pictures into what they begin with would do so with the latents of a window.
    spaces = {name: space for name, space in latent_spaces().items() if not space.still and not space.mixes}
    for own in (CogVideoXLatents(), LTX2Latents(), AnimateDiffLatents()):
        spaces |= dict.fromkeys(own.pipelines, own)
    return {**spaces, **{name: spaces[like] for name, like in ALIKE.items()}}
