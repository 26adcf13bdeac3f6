"""Kandinsky 5, image-to-video: the clip's first latent frame is the picture's, and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.kandinsky5 import Kandinsky5Latents


class Kandinsky5ImageLatents(Kandinsky5Latents):
    pipelines = ("Kandinsky5I2VPipeline",)
    mixes = True

    def begun(
        self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        given = prepare(*args, **kwargs)  # (1, t, h, w, C), with the condition's channels and its mask after them
        given[:, 1:, ..., : latents.shape[1]] = latents[:, :, 1:].permute(0, 2, 3, 4, 1).to(given)
        return given


SPACE = Kandinsky5ImageLatents()
