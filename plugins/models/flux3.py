"""Flux.3: blocks over the image alone, then blocks over [text | image | reference images], which count as text.

The text and the reference images have blocks of their own before they join the image; those stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.position_ids import image_shape
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = (
    "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "image_cond_hidden_states", "image_cond_ids",
)  # fmt: skip
PIXELS = 16  # of a token, where only a denoiser is known
MAX_TEXT = 512  # what ``explain`` counts: prompts are padded to the length that they need, up to 8,192


class Flux3Family(Family):
    name = "flux3"
    classes: tuple[str, ...] = ("Flux3Transformer2DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        rows, columns, _ = image_shape(call["img_ids"])
        references = call.get("image_cond_hidden_states")
        others = 0 if references is None else references.shape[1]
        text = call["encoder_hidden_states"].shape[1] + others
        return Grid(1, rows, columns, text=text, text_first=True, opposite=others)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        stacks = {
            "mode_blocks.image": model.mode_blocks["image"],
            "single_transformer_blocks": model.single_transformer_blocks,
        }
        blocks = [(f"{name}.{i}", block) for name, stack in stacks.items() for i, block in enumerate(stack)]
        return [
            AttentionLayer(f"{name}.attn", block.attn, number, heads, head_dim)
            for number, (name, block) in enumerate(blocks)
        ]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        pixels = 2 * pipe.vae_scale_factor if hasattr(pipe, "vae_scale_factor") else PIXELS
        return Grid(1, *image_tokens(denoiser, size, pixels), text=MAX_TEXT, text_first=True)


register_family(Flux3Family())
