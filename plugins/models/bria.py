"""Bria 3: Flux.1's blocks, with timesteps as the scheduler counts them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tilewise.plugins.models.common.image import by_name
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.flux import CONTROLNET, FluxFamily


class BriaFamily(FluxFamily):
    name = "bria"
    classes: tuple[str, ...] = ("BriaTransformer2DModel",)
    streams: ClassVar = {}
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
        "attention_kwargs", "return_dict", *CONTROLNET,
    )  # fmt: skip
    max_text = 128  # the pipelines' max_sequence_length, which they pad every prompt to

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(self.parameters, args, kwargs)["timestep"]


register_family(BriaFamily())
