"""EasyAnimate: one scaling factor for all channels, and one shift of the noise schedule for all sizes."""

from __future__ import annotations

from typing import Any

from tilewise.pipelines.latent_spaces.base import LatentSpace


class EasyAnimateLatents(LatentSpace):
    pipelines = ("EasyAnimatePipeline",)
    one_batch = True

    def factors(self, pipe: Any) -> tuple[int, int]:
        return pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio

    def mu(self, config: Any, tokens: int, asked: dict[str, Any]) -> float:
        return float(asked["mu"])


SPACE = EasyAnimateLatents()
