"""ChronoEdit: Wan's image-to-video with other positions in time, to edit a picture as the last frame of a clip.

Its blocks are copies of Wan's in a file of their own, which Wan's fused kernels do not stand in for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.plugins.models.common.family import AttentionLayer, Family, FusedState
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.rotary import Rotary
from tilewise.plugins.models.wan import WanFamily


class ChronoEditFamily(WanFamily):
    name = "chronoedit"
    classes: tuple[str, ...] = ("ChronoEditTransformer3DModel",)
    streams: ClassVar = {}

    def rotary(self, denoiser: nn.Module) -> Rotary | str:
        return "ChronoEdit makes clips of a few frames, whose last position in time is set apart"

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        return "ChronoEdit is conditioned by a picture in channels of its own"

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "a split sequence of ChronoEdit was not compared with one process"

    def fuse(self, denoiser: nn.Module, state: FusedState) -> list[Any]:
        return Family.fuse(self, denoiser, state)

    def self_attention(self, layer: AttentionLayer) -> Callable[..., torch.Tensor | None] | None:
        return None

    def notes(self, denoiser: nn.Module, *, fuse: bool, dense: Collection[str]) -> list[str]:
        return []


register_family(ChronoEditFamily())
