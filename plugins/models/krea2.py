"""Krea 2: one stream of [text | image], with fewer heads of keys than of queries; prompts padded, with a mask of keys.

The text's own blocks, before it joins the image, stay as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.position_ids import image_shape
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = ("hidden_states", "encoder_hidden_states", "timestep", "position_ids", "encoder_attention_mask")
MAX_TEXT = 512  # the pipeline's max_sequence_length


class Krea2Family(Family):
    name = "krea2"
    classes: tuple[str, ...] = ("Krea2Transformer2DModel",)
    attention: ClassVar = "attn"

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        text = call["encoder_hidden_states"].shape[1]
        rows, columns, others = image_shape(call["position_ids"], text)
        return Grid(1, rows, columns, text=text + others, text_first=True, opposite=others)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        rows, columns = image_tokens(denoiser, size, 2 * getattr(pipe, "vae_scale_factor", 8))
        return Grid(1, rows, columns, text=MAX_TEXT, text_first=True)


register_family(Krea2Family())
