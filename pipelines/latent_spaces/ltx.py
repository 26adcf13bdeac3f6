"""LTX-Video: latents packed into tokens, and a decoder that may want to be told a noise level, here as in the pipeline none."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, Statistics
from tilewise.plugins.diffusers_compat import pack_latents, unpack_latents


class LTXLatents(LatentSpace):
    pipelines = ("LTXPipeline",)
    one_batch = True

    def factors(self, pipe: Any) -> tuple[int, int]:
        return pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        mean, std = (x.view(1, -1, 1, 1, 1).to(like) for x in (vae.latents_mean, vae.latents_std))
        return mean, std / vae.config.scaling_factor

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return pack_latents(pipe, latents, *_patches(pipe))

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        return unpack_latents(pipe, latents, *shape, *_patches(pipe))

    def decode_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        level = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return vae.decode(latents, level, return_dict=False)[0]


def _patches(pipe: Any) -> tuple[int, int]:
    return pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size


SPACE = LTXLatents()
