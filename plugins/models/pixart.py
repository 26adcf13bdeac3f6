"""PixArt-α and PixArt-Σ: self-attention over the image alone, and cross-attention to the text.

Positions are added when the image is cut into patches, so only hidden states have a token order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import contiguous_hidden_states
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = ("hidden_states", "encoder_hidden_states", "timestep")


class PixArtFamily(Family):
    name = "pixart"
    classes: tuple[str, ...] = ("PixArtTransformer2DModel",)
    guidance_in_batch: ClassVar[bool] = True

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        model: Any = denoiser
        latents = by_name(PARAMETERS, args, kwargs)["hidden_states"]
        return Grid(1, *(n // model.config.patch_size for n in latents.shape[2:]))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        pixels = model.config.patch_size * getattr(pipe, "vae_scale_factor", 8)
        return Grid(1, *image_tokens(denoiser, size, pixels))


register_family(PixArtFamily())
