"""Mochi 1: text-to-video.

    sequence = [video, text]        one softmax over both; the video in raster order, t slowest

Self-attention is ``attn1`` of each block. Its processor leaves the padding of the prompt out, sample by sample, so that each of
its attention calls has one sample and that sample's number of text tokens, which may be none. Rotary tables, one row a video
token, come from ``rope``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import split_input
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import argument, check_size
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import joint_plan


class MochiFamily(Family):
    name = "mochi"
    classes: tuple[str, ...] = ("MochiTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        text = argument(args, kwargs, 1, "encoder_hidden_states")
        config: Any = denoiser.config
        frames, height, width = latents.shape[2:]
        return Grid(frames, height // config.patch_size, width // config.patch_size, text=text.shape[1])

    text_per_sample: ClassVar = True
    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return joint_plan("transformer_blocks.0", "rope", rope_axes=3, encoder_attention_mask=split_input(1, 2))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return 1000 - argument(args, kwargs, 2, "timestep")  # it counts from noise to video

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_spatial_scale_factor", 8)
        temporal = getattr(pipe, "vae_temporal_scale_factor", 6)
        # The pipeline's own check asks for 8; what does not fill whole patches then fails in mid-denoise.
        pixels = math.lcm(8, spatial * config.patch_size)
        check_size(denoiser, pipe, size, height=pixels, width=pixels, frames=temporal)
        side = spatial * config.patch_size
        text = config.max_sequence_length
        return Grid((size.frames - 1) // temporal + 1, size.height // side, size.width // side, text=text)


register_family(MochiFamily())
