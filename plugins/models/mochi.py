"""Mochi 1.

    sequence = [video, text]        one softmax over both; the video in raster order, t slowest

Self-attention is ``attn1`` of each block. Its processor leaves the padding of the prompt out, sample by sample, so that each of
its attention calls has one sample and that sample's number of text tokens, which may be none. Rotary tables, one row a video
token, come from ``rope``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tilewise.kernels.layout import Grid
from tilewise.plugins.models.base import AttentionLayer, Reorder, Size, register_family
from tilewise.plugins.models.forward_arguments import argument, changed, check_size


class MochiFamily:
    name = "mochi"
    classes: tuple[str, ...] = ("MochiTransformer3DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        text = argument(args, kwargs, 1, "encoder_hidden_states")
        config: Any = denoiser.config
        frames, height, width = latents.shape[2:]
        return Grid(frames, height // config.patch_size, width // config.patch_size, text=text.shape[1])

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return 1000 - argument(args, kwargs, 2, "timestep")  # it counts from noise to video

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

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return changed(args, kwargs, 0, "hidden_states", reorder.into)

        def leave(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return reorder.back(output[0]), output[1]

        return [
            model.rope.register_forward_hook(rotary_tables),
            model.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            model.transformer_blocks[-1].register_forward_hook(leave),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            # MochiTransformerBlock calls attn1 with keyword arguments alone.
            rotary = tuple(reorder.back(table, 0) for table in kwargs["image_rotary_emb"])
            video = reorder.back(kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": video, "image_rotary_emb": rotary}

        def leave(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return reorder.into(output[0]), output[1]

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_spatial_scale_factor", 8)
        temporal = getattr(pipe, "vae_temporal_scale_factor", 6)
        # The pipeline's own check asks for 8; what does not fill whole patches then fails in mid-denoise.
        pixels = math.lcm(8, spatial * config.patch_size)
        check_size(denoiser, pipe, size, height=pixels, width=pixels, frames=temporal)
        side = spatial * config.patch_size
        text = config.max_sequence_length
        return Grid((size.num_frames - 1) // temporal + 1, size.height // side, size.width // side, text=text)


register_family(MochiFamily())
