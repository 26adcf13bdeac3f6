"""Cosmos 1.0, 2 and 2.5: text-, image- and video-to-world, text-to-image, and transfer with a control network.

Self-attention is ``attn1`` of each block, over the video tokens alone in raster order (t slowest); text and image conditions
enter through cross-attention. Rotary tables have one row a token, learnable positions (1.0) are added in every block. A timestep
a frame (2 and 2.5) becomes modulation per token, which the forward makes for all blocks and the last norm. The control network
is another model, which stays as it is.
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
from tilewise.plugins.models.common.sequence_split import video_plan


class CosmosFamily(Family):
    name = "cosmos"
    classes: tuple[str, ...] = ("CosmosTransformer3DModel",)

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        model: Any = denoiser
        rope = {"rope": {n: split_input(0, 2, output=True) for n in (0, 1)}}
        by_token = {name: split_input(1, 3) for name in ("embedded_timestep", "temb", "extra_pos_emb")}
        return video_plan("transformer_blocks", len(model.transformer_blocks), rope, **by_token)

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        blocks: Any = denoiser.transformer_blocks
        return [block.attn2 for block in blocks]

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        return Grid(*(n // p for n, p in zip(latents.shape[2:], _patch_size(denoiser), strict=True)))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        # 2 and 2.5 count noise in 0 … 1. 1.0 has ¼ log σ, for which this is only monotonic: patch its pipeline, whose scheduler
        # knows the step.
        return 1000 * argument(args, kwargs, 1, "timestep")

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        pt, ph, pw = _patch_size(denoiser)
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 8 if config.extra_pos_embed_type else 4)
        # The pipelines' own check asks for 16, whatever the VAE; then they round down, silently.
        check_size(
            denoiser,
            pipe,
            size,
            height=math.lcm(16, spatial * ph),
            width=math.lcm(16, spatial * pw),
            frames=temporal * pt,
        )
        frames = (size.frames - 1) // temporal + 1
        return Grid(frames // pt, size.height // spatial // ph, size.width // spatial // pw)


def _patch_size(denoiser: nn.Module) -> tuple[int, int, int]:
    config: Any = denoiser.config
    return tuple(config.patch_size)


register_family(CosmosFamily())
