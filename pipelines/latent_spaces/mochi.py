"""Mochi 1: a mean and std for each channel, and a scaling factor beside them."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, Statistics, by_channel


class MochiLatents(LatentSpace):
    pipelines = ("MochiPipeline",)
    one_batch = True

    def factors(self, pipe: Any) -> tuple[int, int]:
        return pipe.vae_spatial_scale_factor, pipe.vae_temporal_scale_factor

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        if vae.config.latents_mean is None or vae.config.latents_std is None:
            return super().statistics(vae, like)
        mean, std = by_channel(vae.config, like)
        return mean, std / vae.config.scaling_factor


SPACE = MochiLatents()
