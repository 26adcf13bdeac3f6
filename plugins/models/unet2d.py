"""UNets without text: self-attention over the feature map of a level, pixels or latents (DDPM, DDIM, LDM).

Maps of these models are small: those with fewer than 4,096 places stay dense, unless ``min_tokens`` says otherwise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Size
from tilewise.plugins.models.common.image import image_tokens
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.unet import UNetFamily


class UNet2DFamily(UNetFamily):
    name = "unet2d"
    prompt_tokens: ClassVar[bool] = False
    classes: tuple[str, ...] = ("UNet2DModel",)
    guidance_in_batch: ClassVar[bool] = False
    per_frame: ClassVar[tuple[str, ...]] = ()

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        deepest = len(model.down_blocks) - 1
        levels = [(f"down_blocks.{i}", block, i) for i, block in enumerate(model.down_blocks)]
        levels.append(("mid_block", model.mid_block, deepest))
        levels += [(f"up_blocks.{i}", block, deepest - i) for i, block in enumerate(model.up_blocks)]
        found: list[AttentionLayer] = []
        for prefix, block, downsample in levels:
            for i, attention in enumerate(getattr(block, "attentions", None) or ()):
                if attention is None or not hasattr(attention, "processor"):
                    continue
                heads = attention.heads
                name = f"{prefix}.attentions.{i}"
                found.append(
                    AttentionLayer(name, attention, len(found), heads, attention.inner_dim // heads, downsample)
                )
        return found

    def temporal_layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        return []

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        factor = getattr(pipe, "vae_scale_factor", 1)
        rows, columns = image_tokens(denoiser, size, factor * 2 ** (len(model.down_blocks) - 1))
        scale = 2 ** (len(model.down_blocks) - 1)
        return Grid(1, rows * scale, columns * scale)


register_family(UNet2DFamily())
