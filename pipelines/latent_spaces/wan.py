"""Wan 2.1 and 2.2. The encoder takes frames in runs of 4 after the first, whatever the VAE's own factor in time."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, Statistics, by_channel


class WanLatents(LatentSpace):
    pipelines = ("WanPipeline",)
    encoder_run = 4

    def channels(self, vae: Any) -> int:
        return vae.config.z_dim

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        return by_channel(vae.config, like)


SPACE = WanLatents()
