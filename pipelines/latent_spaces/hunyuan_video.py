"""HunyuanVideo: one scaling factor for all channels."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.base import LatentSpace


class HunyuanVideoLatents(LatentSpace):
    pipelines = ("HunyuanVideoPipeline",)
    distilled = True


SPACE = HunyuanVideoLatents()
