"""Cosmos 1.0, 2 and 2.5: text-, image- and video-to-world, text-to-image, and transfer with a control network.

Self-attention is ``attn1`` of each block, over the video tokens alone in raster order (t slowest); text and image conditions
enter through cross-attention. Rotary tables have one row a token, learnable positions (1.0) are added in every block. A timestep
a frame (2 and 2.5) becomes modulation per token, which the forward makes for all blocks and the last norm. The control network
is another model, which stays as it is; what it adds to the hidden states of a block follows the order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Reorder, Size
from tilewise.plugins.models.common.forward_arguments import argument, changed, check_size, reorder_in_place
from tilewise.plugins.models.common.registry import register_family


class CosmosFamily(Family):
    name = "cosmos"
    classes: tuple[str, ...] = ("CosmosTransformer3DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        return Grid(*(n // p for n, p in zip(latents.shape[2:], _patch_size(denoiser), strict=True)))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        # 2 and 2.5 count noise in 0 … 1. 1.0 has ¼ log σ, for which this is only monotonic: patch its pipeline, whose scheduler
        # knows the step.
        return 1000 * argument(args, kwargs, 1, "timestep")

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        config: Any = denoiser.config
        blocks: Any = denoiser.transformer_blocks
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        return [
            AttentionLayer(f"transformer_blocks.{i}.attn1", block.attn1, i, heads, head_dim)
            for i, block in enumerate(blocks)
        ]

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        model: Any = denoiser

        def rotary_tables(module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> Any:
            return tuple(reorder.into(table, 0) for table in output)

        def positions(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return reorder.into(output)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            for at, name in ((2, "embedded_timestep"), (3, "temb")):
                modulation = argument(args, kwargs, at, name)
                if modulation.ndim == 3:
                    reorder_in_place(modulation, reorder, 1)
            return changed(args, kwargs, 0, "hidden_states", reorder.into)

        def control(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return changed(args, kwargs, 7, "controlnet_residual", reorder.into)

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return reorder.back(output)  # after the norm, whose modulation is in the order in force

        blocks = model.transformer_blocks
        handles = [block.register_forward_pre_hook(control, with_kwargs=True) for block in blocks]
        if model.learnable_pos_embed is not None:
            handles.append(model.learnable_pos_embed.register_forward_hook(positions))
        return [
            *handles,
            model.rope.register_forward_hook(rotary_tables),
            blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            model.norm_out.register_forward_hook(leave),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            # Blocks call attn1(hidden_states, image_rotary_emb=…).
            rotary = tuple(reorder.back(table, 0) for table in kwargs["image_rotary_emb"])
            return (reorder.back(args[0]), *args[1:]), {**kwargs, "image_rotary_emb": rotary}

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return reorder.into(output)

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

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
        frames = (size.num_frames - 1) // temporal + 1
        return Grid(frames // pt, size.height // spatial // ph, size.width // spatial // pw)


def _patch_size(denoiser: nn.Module) -> tuple[int, int, int]:
    config: Any = denoiser.config
    return tuple(config.patch_size)


register_family(CosmosFamily())
