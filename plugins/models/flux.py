"""Flux.1 (dev, schnell, Fill, Control, Redux, Kontext): text and image tokens in one attention.

Double blocks keep two streams and attend over [text | image]; single blocks run on that sequence. Images come packed, with
their positions in ``img_ids``. Kontext's reference images follow the image in its stream, and count as text.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size, Streams
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.position_ids import image_shape
from tilewise.plugins.models.common.registry import register_family

CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")


class FluxFamily(Family):
    name = "flux"
    classes: tuple[str, ...] = ("FluxTransformer2DModel",)
    streams: ClassVar = {
        "FluxTransformer2DModel": Streams(
            ("transformer_blocks", "single_transformer_blocks"), text=1, joint=True, text_first=True
        )
    }
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
        "joint_attention_kwargs", *CONTROLNET,
    )  # fmt: skip
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention: ClassVar = "attn"
    max_text = 512  # the pipelines' max_sequence_length, which they pad every prompt to

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(self.parameters, args, kwargs)
        rows, columns, others = image_shape(call["img_ids"])
        text = call["encoder_hidden_states"].shape[1] + others
        return Grid(1, rows, columns, text=text, text_first=True, opposite=others)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(self.parameters, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        rows, columns = image_tokens(denoiser, size, 2 * getattr(pipe, "vae_scale_factor", 8))
        return Grid(1, rows, columns, text=self.max_text, text_first=True)


register_family(FluxFamily())
