"""Helios: long video, chunk after chunk; each follows a history of earlier frames, at three scales.

    sequence = [history ÷ 4 | history ÷ 2 | newest frames | video]

Every query sees the history, and it sees everything: in a plan its tokens count as text. The prompt comes in by cross-attention.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import argument
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes
from tilewise.plugins.models.hunyuan_video_framepack import history_tokens

CHUNK = 9  # num_latent_frames_per_chunk
HISTORY = (2, 2, 16)  # latent frames: the first and the newest, halved, quartered
PARTS = ((7, "latents_history_short"), (8, "latents_history_mid"), (9, "latents_history_long"))


class HeliosFamily(Family):
    name = "helios"
    classes: tuple[str, ...] = ("HeliosTransformer3DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("blocks",)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "its history frames join the sequence in the forward, and no plan says how they are split"

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        model: Any = denoiser
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        t, h, w = (n // p for n, p in zip(latents.shape[2:], model.config.patch_size, strict=True))
        parts = [argument(args, kwargs, *part) for part in PARTS]
        history = sum(history_tokens(part.shape[2:], scale) for scale, part in enumerate(parts) if part is not None)
        return Grid(t, h, w, text=history, text_first=True)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 1, "timestep")

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        _, ph, pw = model.config.patch_size
        refuse(
            denoiser,
            wrong_sizes(
                Rule("height", size.height, spatial * ph),
                Rule("width", size.width, spatial * pw),
                Rule("frames", size.frames, 1),
            ),
        )
        latent = size.height // spatial, size.width // spatial
        history = sum(history_tokens((frames, *latent), scale) for scale, frames in enumerate(HISTORY))
        return Grid(CHUNK, latent[0] // ph, latent[1] // pw, text=history, text_first=True)


register_family(HeliosFamily())
