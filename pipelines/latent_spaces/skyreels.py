"""SkyReels-V2, from text and pictures: Wan's latents."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.wan import WanLatents


class SkyReelsLatents(WanLatents):
    pipelines = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline")


SPACE = SkyReelsLatents()
