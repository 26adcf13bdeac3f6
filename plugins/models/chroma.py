"""Chroma: Flux.1 without guidance or pooled text, and with an attention mask for the padding of the prompt.

The stock blocks each expand the (B, S) mask they receive to (B, 1, S, S). Here the mask is made once a forward and handed to the
attention modules. A boolean mask becomes one over keys, (B, 1, 1, S): the difference is in the outputs of padding tokens, which
no image token reads. diffusers' own pipelines pass floating-point masks, 1 for a visible token and 0 for padding, which PyTorch
adds to the scores: padding is not hidden, its weight is divided by e. Then the mask is the stock (B, 1, S, S) one; see
``plugins/masks/additive_padding_mask.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.plugins.diffusers_compat import gathered_output, split_input
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

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        tokens = {name: split_input(1, 3) for name in ("hidden_states", "encoder_hidden_states")}
        positions = {name: split_input(0, 2) for name in ("img_ids", "txt_ids")}
        return {"": tokens | positions, "proj_out": gathered_output(1, 3)}

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        masks: list[torch.Tensor] = []  # of the current forward, kept from the blocks

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
            denoiser.register_forward_pre_hook(take, with_kwargs=True),
            denoiser.register_forward_hook(forget, always_call=True),
            *(layer.module.register_forward_pre_hook(give, with_kwargs=True) for layer in self.layers(denoiser)),
        ]


register_family(ChromaFamily())
