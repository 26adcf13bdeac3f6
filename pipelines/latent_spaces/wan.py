"""Wan 2.1 and 2.2, from text, pictures (I2V, first and last frame) and control videos (VACE). The encoder takes frames in runs of
4 after the first, whatever the VAE's own factor in time."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, Statistics, by_channel


class WanLatents(LatentSpace):
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
    encoder_run = 4
    unserved: ClassVar = {
        "reference": "VACE's reference pictures are frames of the latents, which the native clip does not have"
    }

    def channels(self, vae: Any) -> int:
        return vae.config.z_dim

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        return by_channel(vae.config, like)


SPACE = WanLatents()
