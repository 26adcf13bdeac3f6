"""Kandinsky 5: text- and image-to-video, text-to-image, image-to-image.

Self-attention is ``self_attention`` of each visual block, over the visual tokens alone; text has blocks of its own and enters
through ``cross_attention``. Latents have their channels last. Models with ``attention_type="nabla"`` bring sparse attention of
their own: tokens in squares of 8 × 8 and, in each layer, a block mask for FlexAttention; that is left as it is.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import gathered_output, split_input
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size, Streams
from tilewise.plugins.models.common.forward_arguments import argument, check_size
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import ONE_BLOCK
from tilewise.plugins.models.common.sizes import within_positions


class Kandinsky5Family(Family):
    name = "kandinsky5"
    classes: tuple[str, ...] = ("Kandinsky5Transformer3DModel",)
    streams: ClassVar = {
        "Kandinsky5Transformer3DModel": Streams(
            ("visual_transformer_blocks",), text=1, own="self_attention", cross="cross_attention", hidden="visual_embed"
        )
    }

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        model: Any = denoiser
        if getattr(model.config, "attention_type", "regular") != "regular":
            return f"its own sparse attention ({model.config.attention_type}) needs all tokens of all heads"
        stack, last = "visual_transformer_blocks", len(model.visual_transformer_blocks) - 1
        if not last:
            return ONE_BLOCK
        return {
            f"{stack}.0": {"visual_embed": split_input(1, 3)},
            f"{stack}.*": {"rope": split_input(1, 6)},
            f"{stack}.{last}": gathered_output(1, 3),
        }

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        model: Any = denoiser
        return [model.text_transformer_blocks, *(block.cross_attention for block in model.visual_transformer_blocks)]

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, frames, height, width, C)
        return Grid(*(n // p for n, p in zip(latents.shape[1:4], _patch_size(denoiser), strict=True)))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 2, "timestep")

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if argument(args, kwargs, 7, "sparse_params") is None:
            return None
        return (
            "the model runs its own sparse attention (nabla); transformer.register_to_config(attention_type='regular') "
            "switches that off"
        )

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        config: Any = denoiser.config
        blocks: Any = denoiser.visual_transformer_blocks
        head_dim = sum(config.axes_dims)
        heads = config.model_dim // head_dim
        return [
            AttentionLayer(f"visual_transformer_blocks.{i}.self_attention", block.self_attention, i, heads, head_dim)
            for i, block in enumerate(blocks)
        ]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        pt, ph, pw = _patch_size(denoiser)
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 4)
        # The pipelines' own check asks for 16, whatever the VAE.
        height, width = math.lcm(16, spatial * ph), math.lcm(16, spatial * pw)
        check_size(denoiser, pipe, size, height=height, width=width, frames=temporal * pt)
        known = getattr(
            pipe, "resolutions", None
        )  # image pipelines: (width, height); they take others for the nearest shape
        if known and (size.width, size.height) not in known:
            w, h = min(known, key=lambda r: abs(r[0] / r[1] - size.width / size.height))
            raise ConfigError(
                f"{type(pipe).__name__} does not make {size.width}×{size.height} (width × height): it would take the nearest "
                f"shape that it knows, {w}×{h}"
            )
        frames = (size.frames - 1) // temporal + 1
        grid = Grid(frames // pt, size.height // spatial // ph, size.width // spatial // pw)
        model: Any = denoiser
        return within_positions(denoiser, grid, model.visual_rope_embeddings.max_pos)


def _patch_size(denoiser: nn.Module) -> tuple[int, int, int]:
    config: Any = denoiser.config
    return tuple(config.patch_size)


register_family(Kandinsky5Family())
