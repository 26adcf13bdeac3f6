"""CogView 4, and its control model: one attention over [text | image] in every block.

A mask of the text's padding becomes one of pairs in each layer, 1 for visible ones, which PyTorch adds to the scores; see
``plugins/masks/additive_padding_mask.py``. diffusers' pipelines give none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = (
    "hidden_states", "encoder_hidden_states", "timestep", "original_size", "target_size", "crop_coords", "attention_kwargs",
    "return_dict", "attention_mask", "image_rotary_emb",
)  # fmt: skip
MAX_TEXT = 1024  # the pipelines' max_sequence_length; they pad prompts to a multiple of 16 only


class CogView4Family(Family):
    name = "cogview4"
    classes: tuple[str, ...] = ("CogView4Transformer2DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        model: Any = denoiser
        rows, columns = (n // model.config.patch_size for n in call["hidden_states"].shape[2:])
        return Grid(1, rows, columns, text=call["encoder_hidden_states"].shape[1], text_first=True)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        rows, columns = image_tokens(denoiser, size, model.config.patch_size * getattr(pipe, "vae_scale_factor", 8))
        return Grid(1, rows, columns, text=MAX_TEXT, text_first=True)


register_family(CogView4Family())
