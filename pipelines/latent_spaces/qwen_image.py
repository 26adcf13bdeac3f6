"""Qwen-Image and its Edit models: packed as Flux's, from a video VAE that is given one frame."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import Statistics, by_channel
from tilewise.pipelines.latent_spaces.flux import FluxLatents


class QwenImageLatents(FluxLatents):
    pipelines = (
        "QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageImg2ImgPipeline",
    )  # fmt: skip
    flat = distilled = False

    def channels(self, vae: Any) -> int:
        return vae.config.z_dim

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        return by_channel(vae.config, like)


SPACE = QwenImageLatents()
