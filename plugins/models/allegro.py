"""Allegro: text-to-video.

Self-attention is ``attn1`` of each block, over the video tokens alone in raster order (t slowest); text enters through
cross-attention. The pipeline hands the forward tables of rotations by position and, apart, each token's three positions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import argument, check_size
from tilewise.plugins.models.common.registry import register_family


class AllegroFamily(Family):
    name = "allegro"
    prompt_tokens: ClassVar[bool] = True
    classes: tuple[str, ...] = ("AllegroTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "its blocks take rotary positions and masks of the whole sequence"

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        config: Any = denoiser.config
        frames, height, width = latents.shape[2:]
        return Grid(frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 2, "timestep")

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 4)
        side = spatial * config.patch_size
        # The pipeline's own check asks for 8; what does not fill whole patches then fails in mid-denoise.
        check_size(denoiser, pipe, size, height=math.lcm(8, side), width=math.lcm(8, side), frames=1)
        # Any number of frames: the pipeline adds what the last latent frame lacks, and cuts it off again.
        odd = size.frames % 2
        frames = math.ceil((size.frames - odd) / temporal) + odd
        return Grid(frames // config.patch_size_t, size.height // side, size.width // side)


register_family(AllegroFamily())
