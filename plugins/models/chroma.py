"""Chroma: Flux.1 without guidance or pooled text, and with an attention mask for the padding of the prompt.

Its blocks make an (S, S) mask of the (B, S) one that they are given, each anew. Here the attention modules are given one. Where
the mask is of booleans, that is the keys' alone, which says as much: what a padding token gets is never seen by an image token.
diffusers' own pipelines give floating-point ones, 1 for a visible token and 0 for padding, which PyTorch adds to the scores:
padding is weighed down by e and not hidden. There it is stock's (S, S) mask, made once: see ``weighed_text``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.plugins.models.common.family import Reorder
from tilewise.plugins.models.common.image import by_name
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.flux import CONTROLNET, FluxFamily


class ChromaFamily(FluxFamily):
    name = "chroma"
    classes: tuple[str, ...] = ("ChromaTransformer2DModel",)
    parameters: tuple[str, ...] = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "attention_mask",
        "joint_attention_kwargs", *CONTROLNET,
    )  # fmt: skip

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        masks: list[torch.Tensor] = []  # of the forward that is under way, where the blocks do not get it

        def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = by_name(self.parameters, args, kwargs)
            mask = call.get("attention_mask")
            masks.clear()
            if mask is None:
                return None
            keys = mask[:, None, None, :]
            masks.append(keys if mask.dtype == torch.bool else keys * mask[:, None, :, None])
            return (), {**call, "attention_mask": None}

        def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            return (args, {**kwargs, "attention_mask": masks[0]}) if masks else None

        def forget(module: nn.Module, args: tuple, output: Any) -> None:
            masks.clear()

        return [
            *super().reorder_hooks(denoiser, reorder),
            denoiser.register_forward_pre_hook(take, with_kwargs=True),
            denoiser.register_forward_hook(forget, always_call=True),
            *(layer.module.register_forward_pre_hook(give, with_kwargs=True) for layer in self.layers(denoiser)),
        ]


register_family(ChromaFamily())
