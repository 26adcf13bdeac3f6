"""HunyuanVideo 1.5: one scaling factor for all channels; guidance is the pipeline's guider's, and no argument of its call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tilewise.pipelines.latent_spaces.base import LatentSpace


class HunyuanVideo15Latents(LatentSpace):
    pipelines = ("HunyuanVideo15Pipeline",)

    @contextmanager
    def guided(self, pipe: Any, guidance: float) -> Iterator[None]:
        guider = pipe.guider
        if guider._enabled:  # the pipeline asks for it too
            pipe.guider = guider.new(guidance_scale=guidance)
        try:
            yield
        finally:
            pipe.guider = guider


SPACE = HunyuanVideo15Latents()
