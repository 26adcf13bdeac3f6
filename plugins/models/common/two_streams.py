"""Families whose blocks return (video, text) and whose rotary tables, (video, D) each, come from one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.plugins.models.common.family import AttentionLayer, Family, Reorder
from tilewise.plugins.models.common.forward_arguments import changed


class TwoStreams(Family):
    """Defines the layers and hooks; a subclass sets ``rope``, the name of the module that makes the tables."""

    rope: str

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
            getattr(model, self.rope).register_forward_hook(rotary_tables),
            model.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            model.transformer_blocks[-1].register_forward_hook(leave),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            # The blocks call attn1 with keyword arguments alone.
            rotary = tuple(reorder.back(table, 0) for table in kwargs["image_rotary_emb"])
            video = reorder.back(kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": video, "image_rotary_emb": rotary}

        def leave(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return reorder.into(output[0]), output[1]

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
