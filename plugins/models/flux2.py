"""Flux.2 (dev, klein): like Flux.1, with four position ids per token, for each sample.

Its double blocks attend over [text | image]; its single blocks, which have the feed-forward in the same projections, run on that
sequence. Reference images follow the image in its stream, and count as text.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.flux import FluxFamily


class Flux2Family(FluxFamily):
    name = "flux2"
    classes: tuple[str, ...] = ("Flux2Transformer2DModel",)
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance", "joint_attention_kwargs",
    )  # fmt: skip

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        mode = kwargs.get("kv_cache_mode")
        if mode is None:
            return None
        # There reference images come first, see only each other, and are left out after the first step.
        return (
            f"kv_cache_mode={mode!r} keeps the keys and values of reference images from the first step; Flux2Pipeline and "
            "Flux2KleinPipeline attend to reference images at every step"
        )


register_family(Flux2Family())
