"""Wan, video-to-video: the stage begins with the native clip, which the given video was changed into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.wan import WanLatents


class WanVideoLatents(WanLatents):
    pipelines = ("WanVideoToVideoPipeline",)
    mixes = True

    def begun(
        self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        return latents  # nothing of the video is left to encode; the call takes no latents beside one


SPACE = WanVideoLatents()
