"""FramePack on HunyuanVideo: denoises a window of frames that follows a history of earlier frames, at three scales.

    sequence = [history ÷ 4 | history ÷ 2 | clean frames | video | image | text]

Every query sees the history, image and text tokens, and they see everything: in a plan they count as text.

A batch of one comes without padding and without a mask, more come with a mask over keys alone. Its blocks are HunyuanVideo's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.forward_arguments import argument
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.hunyuan_video import (
    PROMPT,
    HunyuanVideoFamily,
    grid_of,
    patches,
    vae_factors,
)

WINDOW = 9  # latent_window_size, in latent frames
HISTORY = (2, 2, 16)  # latent frames: clean (the first image and the newest), halved, quartered
IMAGE_TOKENS = 27**2  # of SigLIP at 384 pixels


class HunyuanVideoFramepackFamily(HunyuanVideoFamily):
    name = "hunyuan_video_framepack"
    classes: tuple[str, ...] = ("HunyuanVideoFramepackTransformer3DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        prompt_mask = argument(args, kwargs, 3, "encoder_attention_mask")  # (B, text)
        image = argument(args, kwargs, 5, "image_embeds")  # (B, tokens, C)
        # A batch of one is cut to its prompt; the model waits for the device to know its length, and so must this.
        prompt = int(prompt_mask.sum(dtype=torch.int)) if latents.shape[0] == 1 else prompt_mask.shape[1]
        history = 0
        for scale, (position, name) in enumerate(
            ((8, "latents_clean"), (10, "latents_history_2x"), (12, "latents_history_4x"))
        ):
            part = args[position] if len(args) > position else kwargs.get(name)
            if part is not None:
                history += history_tokens(part.shape[2:], scale)
        text = history + image.shape[1] + prompt
        return Grid(*patches(denoiser, latents.shape[2:]), text=text, opposite=history)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "its history frames join the sequence in the forward, and no plan says how they are split"

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        spatial, temporal = vae_factors(pipe, 8)
        checked = grid_of(denoiser, size, spatial, temporal, text=0, smallest=16, any_length=True)
        latent = size.height // spatial, size.width // spatial
        history = sum(history_tokens((frames, *latent), scale) for scale, frames in enumerate(HISTORY))
        encoder = getattr(getattr(pipe, "image_encoder", None), "config", None)
        image = IMAGE_TOKENS if encoder is None else (encoder.image_size // encoder.patch_size) ** 2
        window, _, _ = patches(denoiser, (WINDOW, *latent))
        return Grid(window, checked.h, checked.w, text=history + image + PROMPT, opposite=history)


def history_tokens(latent: Any, scale: int) -> int:
    """Tokens of a history of that many latent (frames, rows, columns): patches of (1, 2, 2), (2, 4, 4) or (4, 8, 8)."""
    t, h, w = latent
    if scale == 0:
        return t * (h // 2) * (w // 2)
    size = 2**scale
    return math.ceil(t / size) * math.ceil(h / (2 * size)) * math.ceil(w / (2 * size))


register_family(HunyuanVideoFramepackFamily())
