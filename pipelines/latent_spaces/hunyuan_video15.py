"""HunyuanVideo 1.5: one scaling factor for all channels; guidance is the pipeline's guider's, and no argument of its call."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.base import LatentSpace


class HunyuanVideo15Latents(LatentSpace):
    pipelines = ("HunyuanVideo15Pipeline",)


SPACE = HunyuanVideo15Latents()
