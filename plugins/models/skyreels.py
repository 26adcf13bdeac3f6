"""SkyReels-V2, Wan's architecture with its own weights: text- and image-to-video, and diffusion forcing (a timestep per frame).

With diffusion forcing, the blocks are given modulation of shape (B, 6, S, C), which the forward makes for all of them. Its
asynchronous mode sets ``num_frame_per_block`` > 1 in the config: a mask over all pairs of tokens then hides later groups of
frames, which no method's plan can express.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.plugins.diffusers_compat import split_input
from tilewise.plugins.models.common.family import Streams
from tilewise.plugins.models.common.lead_timesteps import lead_by_token
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import video_plan
from tilewise.plugins.models.wan import WanFamily

TRAINED_HISTORY = 5  # latent frames, of the 17 frames that its long videos overlap by (arXiv 2504.13074)


class SkyReelsFamily(WanFamily):
    name = "skyreels"
    classes: tuple[str, ...] = ("SkyReelsV2Transformer3DModel",)
    streams: ClassVar = {"SkyReelsV2Transformer3DModel": Streams(("blocks",), text=2)}

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        config: Any = denoiser.config
        if config.num_frame_per_block > 1:
            return f"attention is causal over groups of {config.num_frame_per_block} frames (asynchronous diffusion forcing)"
        return None

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        model: Any = denoiser
        rope = {"rope": {n: split_input(1, 4, output=True) for n in (0, 1)}}
        return video_plan("blocks", len(model.blocks), rope, temb=split_input(2, 4))

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        blocks: Any = denoiser.blocks
        return [block.attn2 for block in blocks]

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        # Diffusion-forcing weights and others have the same config, except for those that are told the frame rate.
        config: Any = denoiser.config
        return TRAINED_HISTORY if config.inject_sample_info else 0

    def with_lead_timesteps(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], lead: torch.Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        timestep = lead_by_token(self.timestep(args, kwargs), lead, 1, self.grid(denoiser, args, kwargs).t)
        given = {**kwargs, "enable_diffusion_forcing": True}
        if len(args) > 1:
            return (args[0], timestep, *args[2:]), given
        return args, {**given, "timestep": timestep}


register_family(SkyReelsFamily())
