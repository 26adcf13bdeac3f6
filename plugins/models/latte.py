"""Latte: blocks over the tokens of each frame, which a method runs in, by turns with blocks over the frames of each place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size
from tilewise.plugins.models.common.forward_arguments import contiguous_hidden_states
from tilewise.plugins.models.common.image import by_name
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import LARGEST, Rule, refuse, wrong_sizes

PARAMETERS = ("hidden_states", "timestep", "encoder_hidden_states")


class LatteFamily(Family):
    name = "latte"
    classes: tuple[str, ...] = ("LatteTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        model: Any = denoiser
        latents = by_name(PARAMETERS, args, kwargs)[
            "hidden_states"
        ]  # (B, C, frames, height, width): frames are samples
        return Grid(1, *(n // model.config.patch_size for n in latents.shape[3:]))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def temporal_layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return [
            AttentionLayer(f"temporal_transformer_blocks.{i}.attn1", block.attn1, i, heads, head_dim)
            for i, block in enumerate(model.temporal_transformer_blocks)
        ]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        pixels = model.config.patch_size * getattr(pipe, "vae_scale_factor", 8)
        wrong = wrong_sizes(Rule("height", size.height, pixels), Rule("width", size.width, pixels))
        if not 1 <= size.frames <= min(LARGEST, model.config.video_length):
            wrong.append(f"frames={size.frames} must be 1 to {model.config.video_length}, for which it has positions")
        refuse(denoiser, wrong)
        return Grid(1, size.height // pixels, size.width // pixels)


register_family(LatteFamily())
