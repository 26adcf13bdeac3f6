"""Stable Diffusion 3 and 3.5: two streams, and one attention over [image | text] in every block.

Some blocks of 3.5 have a second attention over the image alone (``attn2``). Positions are added when the image is cut into
patches, so only hidden states have a token order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size, Streams
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import joint_plan
from tilewise.plugins.models.common.sizes import within_positions

CONTROLNET = "block_controlnet_hidden_states"
PARAMETERS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", CONTROLNET)
MAX_TEXT = 77 + 256  # CLIP's tokens and the pipelines' max_sequence_length for T5, which they pad every prompt to


class SD3Family(Family):
    name = "sd3"
    classes: tuple[str, ...] = ("SD3Transformer2DModel",)
    guidance_in_batch: ClassVar[bool] = True
    streams: ClassVar = {"SD3Transformer2DModel": Streams(("transformer_blocks",), text=1, joint=True, text_first=True)}

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return joint_plan("transformer_blocks.0")

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        model: Any = denoiser
        rows, columns = (n // model.config.patch_size for n in call["hidden_states"].shape[2:])
        return Grid(1, rows, columns, text=call["encoder_hidden_states"].shape[1])

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        found = []
        for i, block in enumerate(model.transformer_blocks):
            for name in ("attn", "attn2"):
                attn = getattr(block, name, None)
                if attn is not None:
                    found.append(AttentionLayer(f"transformer_blocks.{i}.{name}", attn, i, heads, head_dim))
        return found

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        rows, columns = image_tokens(denoiser, size, model.config.patch_size * getattr(pipe, "vae_scale_factor", 8))
        grid = Grid(1, rows, columns, text=MAX_TEXT)
        largest = model.config.pos_embed_max_size
        return within_positions(denoiser, grid, (1, largest, largest)) if largest else grid


register_family(SD3Family())
