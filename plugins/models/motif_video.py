"""Motif-Video: [video, text] in one softmax, with a mask over the text's padding and cross-attention to the text beside it.

A picture's embeddings stand before the text, and count as text. The last blocks, its decoder, attend over two copies of the
video at once, for which there is no grid: they stay as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size
from tilewise.plugins.models.common.forward_arguments import argument, contiguous_hidden_states
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes

MAX_TEXT = 512  # the pipelines' max_sequence_length, which they pad every prompt to


class MotifVideoFamily(Family):
    name = "motif_video"
    classes: tuple[str, ...] = ("MotifVideoTransformer3DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention: ClassVar = "attn"

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        text = argument(args, kwargs, 2, "encoder_hidden_states").shape[1]
        picture = argument(args, kwargs, 4, "image_embeds")
        text += 0 if picture is None else picture.shape[1]
        t, h, w = (n // p for n, p in zip(latents.shape[2:], _patch(denoiser), strict=True))
        return Grid(t, h, w, text=text)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 1, "timestep")

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        found = super().layers(denoiser)
        return found[: len(found) - model.config.num_decoder_layers]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        pt, ph, pw = _patch(denoiser)
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 4)
        refuse(
            denoiser,
            wrong_sizes(
                Rule("height", size.height, spatial * ph),
                Rule("width", size.width, spatial * pw),
                Rule("frames", size.frames, temporal * pt, 1),
            ),
        )
        frames = (size.frames - 1) // temporal + 1
        return Grid(frames // pt, size.height // spatial // ph, size.width // spatial // pw, text=MAX_TEXT)


def _patch(denoiser: Any) -> tuple[int, int, int]:
    config = denoiser.config
    return config.patch_size_t, config.patch_size, config.patch_size


register_family(MotifVideoFamily())
