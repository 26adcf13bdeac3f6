"""HunyuanImage 2.1 and its refiner: [image, text] in one softmax, as in HunyuanVideo, with a mask over the text's padding.

Words to be written (ByT5) come before the prompt; the model puts all padding last.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import contiguous_hidden_states
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r", "encoder_hidden_states_2",
)  # fmt: skip
TEXT = {"tokenizer_max_length": 1000, "tokenizer_2_max_length": 128}
VAE_FACTOR = 32


class HunyuanImageFamily(Family):
    name = "hunyuan_image"
    classes: tuple[str, ...] = ("HunyuanImageTransformer2DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention: ClassVar = "attn"

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        model: Any = denoiser
        call = by_name(PARAMETERS, args, kwargs)
        size = [n // p for n, p in zip(call["hidden_states"].shape[2:], model.config.patch_size, strict=True)]
        words = call.get("encoder_hidden_states_2") if model.context_embedder_2 is not None else None
        text = call["encoder_hidden_states"].shape[1] + (0 if words is None else words.shape[1])
        t, h, w = size if len(size) == 3 else (1, *size)  # the refiner's latents have an axis of frames
        return Grid(t, h, w, text=text)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        pixels = model.config.patch_size[-1] * getattr(pipe, "vae_scale_factor", VAE_FACTOR)
        text = sum(getattr(pipe, name, usual) for name, usual in TEXT.items())
        return Grid(1, *image_tokens(denoiser, size, pixels), text=text)


register_family(HunyuanImageFamily())
