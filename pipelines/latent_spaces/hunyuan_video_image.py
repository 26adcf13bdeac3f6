"""HunyuanVideo, image-to-video: the picture's latents in place of the first latent frame, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.hunyuan_video import HunyuanVideoLatents


class HunyuanVideoImageLatents(HunyuanVideoLatents):
    pipelines = ("HunyuanVideoImageToVideoPipeline",)
    mixes = True

    def refuses(self, pipe: Any) -> str | None:
        if pipe.transformer.config.image_condition_type == "token_replace":
            return None
        return (
            "its image_condition_type is 'latent_concat', with which the pipeline drops a latent frame of what it returns; those "
            "with 'token_replace' are served"
        )

    def begun(
        self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The pipeline mixes a thousandth of the picture into its noise; the native clip shows it already.
        noise, picture = prepare(*args, **kwargs)
        return latents.to(noise), picture


SPACE = HunyuanVideoImageLatents()
