"""Kandinsky 5, text-to-video: latents with their channels last, beside those of a condition where the model takes one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.plugins.diffusers_compat import kandinsky5_rope_scale


class Kandinsky5Latents(LatentSpace):
    pipelines = ("Kandinsky5T2VPipeline",)

    def refuses(self, pipe: Any) -> str | None:
        if pipe.transformer.config.attention_type != "nabla":
            return None
        return (
            "it runs its own sparse attention (nabla); pipe.transformer.register_to_config(attention_type='regular') switches "
            "that off"
        )

    def alike(self, pipe: Any, size: tuple[int, int], own: tuple[int, int]) -> bool:
        # Outside of a range of sides it turns positions by less.
        return kandinsky5_rope_scale(pipe, *size) == kandinsky5_rope_scale(pipe, *own)

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        last = latents.permute(0, 2, 3, 4, 1).contiguous()
        # The condition's latents and its mask: all zero, as there is none.
        return F.pad(last, (0, last.shape[-1] + 1)) if pipe.transformer.visual_cond else last

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        return latents.permute(0, 4, 1, 2, 3)


SPACE = Kandinsky5Latents()
