"""EasyAnimate 5.1: text- and image-to-video, control, inpainting.

    sequence = [text, video]        one softmax over both; the video in raster order, t slowest

Self-attention is ``attn1`` of each block, which joins the two streams for its length alone. Rotary tables, one row a video
token, come from ``rope_embedding``. Text is padded to a fixed length, without a mask: the model sees the padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tilewise.kernels.layout import Grid
from tilewise.plugins.models.base import AttentionLayer, Reorder, Size, register_family
from tilewise.plugins.models.forward_arguments import argument, changed, check_size

MAX_TEXT = 256  # the pipelines' default length of a prompt


class EasyAnimateFamily:
    name = "easyanimate"
    classes: tuple[str, ...] = ("EasyAnimateTransformer3DModel",)

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
            model.rope_embedding.register_forward_hook(rotary_tables),
            model.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            model.transformer_blocks[-1].register_forward_hook(leave),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            # EasyAnimateTransformerBlock calls attn1 with keyword arguments alone.
            rotary = tuple(reorder.back(table, 0) for table in kwargs["image_rotary_emb"])
            video = reorder.back(kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": video, "image_rotary_emb": rotary}

        def leave(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return reorder.into(output[0]), output[1]

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_spatial_compression_ratio", 8)
        temporal = getattr(pipe, "vae_temporal_compression_ratio", 4)
        side = spatial * config.patch_size
        pixels = math.lcm(16, side)  # the pipelines round down to 16, silently
        check_size(denoiser, pipe, size, height=pixels, width=pixels, frames=temporal)
        frames = (size.num_frames - 1) // temporal + 1
        return Grid(frames, size.height // side, size.width // side, text=MAX_TEXT, text_first=True)


register_family(EasyAnimateFamily())
