"""SkyReels-V2, Wan's architecture with its own weights: text- and image-to-video, and diffusion forcing (a timestep per frame).

With diffusion forcing, the blocks are given modulation of shape (B, 6, S, C), which the forward makes for all of them. Its
asynchronous mode sets ``num_frame_per_block`` > 1 in the config: a mask over all pairs of tokens then hides later groups of
frames, which no method's plan can express.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.plugins.models.common.family import Reorder, Streams
from tilewise.plugins.models.common.forward_arguments import argument, changed, reorder_in_place
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

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        model: Any = denoiser

        def rotary_tables(module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> Any:
            return tuple(reorder.into(table) for table in output)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            modulation = argument(args, kwargs, 2, "temb")
            if modulation.ndim == 4:  # one of the six at a time: a sixth of the memory
                for each in modulation.unbind(1):
                    reorder_in_place(each, reorder, 1)
            return changed(args, kwargs, 0, "hidden_states", reorder.into)

        return [
            model.rope.register_forward_hook(rotary_tables),
            model.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.leave_hook(model, reorder),
        ]


register_family(SkyReelsFamily())
