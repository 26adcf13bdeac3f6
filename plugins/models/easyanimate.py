"""EasyAnimate 5.1: text- and image-to-video, control, inpainting.

    sequence = [text, video]        one softmax over both; the video in raster order, t slowest

Self-attention is ``attn1`` of each block, which joins the two streams for its length alone. Rotary tables, one row a video
token, come from ``rope_embedding``. Text is padded to a fixed length, without a mask: the model sees the padding.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size, Streams
from tilewise.plugins.models.common.forward_arguments import argument, check_size, contiguous_hidden_states
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import joint_plan

MAX_TEXT = 256  # the pipelines' default length of a prompt


class EasyAnimateFamily(Family):
    name = "easyanimate"
    classes: tuple[str, ...] = ("EasyAnimateTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True
    streams: ClassVar = {"EasyAnimateTransformer3DModel": Streams(("transformer_blocks",), text=3, joint=True)}

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return joint_plan("transformer_blocks.0", "rope_embedding")

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        prompts = [
            argument(args, kwargs, 3, "encoder_hidden_states"),
            argument(args, kwargs, 4, "encoder_hidden_states_t5"),
        ]
        config: Any = denoiser.config
        frames, height, width = latents.shape[2:]
        text = sum(prompt.shape[1] for prompt in prompts if prompt is not None)
        return Grid(frames, height // config.patch_size, width // config.patch_size, text=text, text_first=True)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 1, "timestep")

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_spatial_compression_ratio", 8)
        temporal = getattr(pipe, "vae_temporal_compression_ratio", 4)
        side = spatial * config.patch_size
        pixels = math.lcm(16, side)  # the pipelines round down to 16, silently
        check_size(denoiser, pipe, size, height=pixels, width=pixels, frames=temporal)
        frames = (size.frames - 1) // temporal + 1
        return Grid(frames, size.height // side, size.width // side, text=MAX_TEXT, text_first=True)


register_family(EasyAnimateFamily())
