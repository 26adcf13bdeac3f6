"""LongCat-Image and its Edit model: Flux.1's blocks without pooled text. Images to edit follow the image, and count as text."""

from __future__ import annotations

from typing import ClassVar

from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.flux import FluxFamily


class LongCatImageFamily(FluxFamily):
    name = "longcat_image"
    classes: tuple[str, ...] = ("LongCatImageTransformer2DModel",)
    streams: ClassVar = {}
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance",
    )  # fmt: skip


register_family(LongCatImageFamily())
