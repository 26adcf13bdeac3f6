"""Ovis-Image: Flux.1's blocks without guidance or pooled text."""

from __future__ import annotations

from typing import ClassVar

from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.flux import FluxFamily


class OvisImageFamily(FluxFamily):
    name = "ovis_image"
    classes: tuple[str, ...] = ("OvisImageTransformer2DModel",)
    streams: ClassVar = {}
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "joint_attention_kwargs",
    )  # fmt: skip
    max_text = 256  # the pipeline's max_sequence_length, which it pads every prompt to


register_family(OvisImageFamily())
