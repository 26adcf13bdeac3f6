"""LTX-2: the video stream of the audio-video model, all its pipelines.

    video tokens = video [, condition frames or references]         the video in raster order, t slowest

Self-attention over the video, ``attn1``, runs the method. The audio stream, cross-attention with the prompt and between the two
streams stay as they are: they give a video token the same result at any place, as its rotary tables and modulation move with it.
The sizes that the forward is given are those of the latents before patchify. The IC-LoRA pipeline weakens its references with a
mask over video tokens, (S, S): such calls fall back to dense, and are counted.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import split_input
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.ltx import LTXFamily


class LTX2Family(LTXFamily):
    name = "ltx2"
    classes: tuple[str, ...] = ("LTX2VideoTransformer3DModel",)
    arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "audio_hidden_states",
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
        "timestep",
        "audio_timestep",
        "sigma",
        "audio_sigma",
        "encoder_attention_mask",
        "audio_encoder_attention_mask",
        "num_frames",
        "height",
        "width",
        "fps",
        "audio_num_frames",
        "video_coords",
    )

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        config: Any = denoiser.config
        tokens = self._argument("hidden_states", args, kwargs).shape[1]
        sizes = [self._argument(name, args, kwargs) for name in ("num_frames", "height", "width")]
        if None not in sizes:
            patch = (config.patch_size_t, config.patch_size, config.patch_size)
            t, h, w = (-(-n // p) for n, p in zip(sizes, patch, strict=True))
            extra = tokens - math.prod((t, h, w))
            if extra == 0 or (extra > 0 and self._argument("video_coords", args, kwargs) is not None):
                return Grid(t, h, w, text=extra)
        return self._grid_of_coords(denoiser, tokens, sizes, args, kwargs)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        # diffusers' plan leaves the tables of cross-attention with the sound whole, and those of the released models too.
        plan = super().context_parallel_plan(denoiser)
        assert isinstance(plan, dict)
        config: Any = denoiser.config
        where = (1, 3) if config.rope_type == "interleaved" else (2, 4)
        tables = {n: split_input(*where, output=True) for n in (0, 1)}
        return {**plan, "rope": tables, "cross_attn_rope": tables}

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        # The sound is whole on each rank, and video_to_audio_attn attends to the video of all of them.
        model: Any = denoiser
        names = ("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn")
        return [getattr(block, name) for block in model.transformer_blocks for name in names]

    def with_lead_timesteps(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], lead: torch.Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        # Its sound has the video's timestep where it has none of its own.
        sound = self._argument("audio_timestep", args, kwargs)
        own = self.timestep(args, kwargs) if sound is None else sound
        args, kwargs = super().with_lead_timesteps(denoiser, args, kwargs, lead)
        at = self.arguments.index("audio_timestep")
        if at < len(args):
            return (*args[:at], own, *args[at + 1 :]), kwargs
        return args, {**kwargs, "audio_timestep": own}


register_family(LTX2Family())
