"""SkyReels-V2, Wan's architecture with its own weights: text- and image-to-video, and diffusion forcing (a timestep per frame).

With diffusion forcing, the blocks are given modulation of shape (B, 6, S, C), which the forward makes for all of them. Its
asynchronous mode sets ``num_frame_per_block`` > 1 in the config: a mask over all pairs of tokens then hides later groups of
frames, which no method's plan can express.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tilewise.plugins.models.common.family import Streams
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.wan import WanFamily


class SkyReelsFamily(WanFamily):
    name = "skyreels"
    classes: tuple[str, ...] = ("SkyReelsV2Transformer3DModel",)
    streams: ClassVar = {"SkyReelsV2Transformer3DModel": Streams(("blocks",), text=2)}

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        config: Any = denoiser.config
        if config.num_frame_per_block > 1:
            return f"attention is causal over groups of {config.num_frame_per_block} frames (asynchronous diffusion forcing)"
        return None


register_family(SkyReelsFamily())
