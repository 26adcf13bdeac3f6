"""The latents of pipelines that can make windows: those of ``latent_spaces``, and some whose schedule no second stage enters."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace, latent_spaces

# Pipelines that begin with a picture or a few frames, and those that have the same latents without one.
ALIKE = {"WanImageToVideoPipeline": "WanPipeline", "WanVACEPipeline": "WanPipeline"}


class CogVideoXLatents(LatentSpace):
    """Frames come before channels."""

    pipelines = ("CogVideoXPipeline",)
    one_batch = True

    def refuses(self, pipe: Any) -> str | None:
        # The pipeline makes more latent frames than it was asked for, and leaves the first ones out in the end.
        return "its tokens have two latent frames each" if pipe.transformer.config.patch_size_t else None

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2)

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        return latents.transpose(1, 2)


def window_spaces() -> dict[str, LatentSpace]:
    """Pipeline class name → its latent space."""
    spaces = {name: space for name, space in latent_spaces().items() if not space.still}
    own = CogVideoXLatents()
    spaces |= dict.fromkeys(own.pipelines, own)
    return {**spaces, **{name: spaces[like] for name, like in ALIKE.items()}}
