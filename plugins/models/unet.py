"""UNets: Stable Diffusion 1.x, 2.x and XL, AnimateDiff, Stable Video Diffusion.

Self-attention is ``attn1`` of the spatial transformer blocks, over one feature map: the pixels of one frame (frames are in the
batch) at the resolution of its level. Each level has a grid of its own. Temporal attention (motion modules, temporal
transformers) runs over a handful of frames: methods leave it as it is, additions reach it by ``temporal_layers``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import unsplit
from tilewise.plugins.errors import UnsupportedModelError
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes


class UNetFamily(Family):
    name = "unet"
    prompt_tokens: ClassVar[bool] = True
    classes: tuple[str, ...] = ("UNet2DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel")
    guidance_in_batch: ClassVar[bool] = True
    per_frame: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
    )

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        # (B, C, H, W), (B, C, frames, H, W) or (B, frames, C, H, W): rows and columns come last in all of them.
        latents = args[0] if args else kwargs["sample"]
        return Grid(1, *latents.shape[-2:])

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        levels = [(f"down_blocks.{i}", block, i) for i, block in enumerate(model.down_blocks)]
        deepest = len(levels) - 1
        if getattr(model, "mid_block", None) is not None:
            levels.append(("mid_block", model.mid_block, deepest))
        levels += [(f"up_blocks.{i}", block, deepest - i) for i, block in enumerate(model.up_blocks)]
        found: list[AttentionLayer] = []
        with_text = False
        for prefix, block, downsample in levels:
            for i, wrapped in enumerate(getattr(block, "attentions", None) or ()):
                transformer = unsplit(wrapped)
                with_text |= getattr(transformer, "added_kv_proj_dim", None) is not None
                for j, inner in enumerate(getattr(transformer, "transformer_blocks", ())):
                    if getattr(inner, "only_cross_attention", False):  # its attn1 looks at the text
                        continue
                    name = f"{prefix}.attentions.{i}.transformer_blocks.{j}.attn1"
                    heads, width = inner.attn1.heads, inner.attn1.inner_dim
                    found.append(AttentionLayer(name, inner.attn1, len(found), heads, width // heads, downsample))
        if with_text and not found:
            raise UnsupportedModelError(
                f"this {type(denoiser).__name__} attends to the keys of its text beside the picture's own, in blocks of the "
                "SimpleCrossAttn types (DeepFloyd IF, Kandinsky 2): no family adapter serves that. Nothing was changed"
            )
        return found

    def temporal_layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        """Of motion modules (AnimateDiff) and temporal transformers (Stable Video Diffusion)."""
        model: Any = denoiser
        blocks = [
            (f"{way}_blocks.{i}", block)
            for way in ("down", "up")
            for i, block in enumerate(getattr(model, f"{way}_blocks"))
        ]
        blocks.append(("mid_block", getattr(model, "mid_block", None)))
        found: list[AttentionLayer] = []
        for prefix, block in blocks:
            for place, inside in (
                ("motion_modules", "transformer_blocks"),
                ("attentions", "temporal_transformer_blocks"),
            ):
                for i, wrapped in enumerate(getattr(block, place, None) or ()):
                    for j, inner in enumerate(getattr(unsplit(wrapped), inside, ())):
                        for name in ("attn1", "attn2"):
                            attention = getattr(inner, name, None)
                            if attention is None or attention.is_cross_attention:
                                continue
                            where = f"{prefix}.{place}.{i}.{inside}.{j}.{name}"
                            heads = attention.heads
                            found.append(
                                AttentionLayer(where, attention, len(found), heads, attention.inner_dim // heads, 0)
                            )
        return found

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        factor = getattr(pipe, "vae_scale_factor", 8)
        refuse(denoiser, wrong_sizes(Rule("height", size.height, factor), Rule("width", size.width, factor)))
        return Grid(1, size.height // factor, size.width // factor)


register_family(UNetFamily())
