"""Flux.1, from text, from a picture that it changes, and Kontext: images, whose latents are packed into tokens of 2×2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.plugins.diffusers_compat import pack_latents, unpack_latents


class FluxLatents(LatentSpace):
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxKontextPipeline", "FluxImg2ImgPipeline")
    still = flat = distilled = True

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        batch, channels, _, h, w = latents.shape
        return pack_latents(pipe, latents[:, :, 0].contiguous(), batch, channels, h, w)

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        factor = pipe.vae_scale_factor
        image = unpack_latents(pipe, latents, shape[1] * factor, shape[2] * factor, factor)
        return image.view(*image.shape[:2], *shape)  # some pipelines keep an axis of frames


SPACE = FluxLatents()
