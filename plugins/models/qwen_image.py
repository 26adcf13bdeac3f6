"""Qwen-Image, its Edit and Layered models: two streams, and one attention over [text | image] in every block.

The sizes of the images come as numbers, ``img_shapes``: of each sample the image's, then those of the images to edit, whose
tokens follow the image's in the stream, and count as text. A layered model makes
several images of one size, its grid's t. Prompts of unequal length are padded, with a mask of keys.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.models.common.family import Family, Size, Streams
from tilewise.plugins.models.common.image import by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = (
    "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes", "guidance",
    "attention_kwargs", "controlnet_block_samples", "additional_t_cond",
)  # fmt: skip
MAX_TEXT = 512  # the pipelines' max_sequence_length; they pad prompts to the longest of a batch only


class QwenImageFamily(Family):
    name = "qwen_image"
    classes: tuple[str, ...] = ("QwenImageTransformer2DModel",)
    attention: ClassVar = "attn"
    masks_per_layer = True
    streams: ClassVar = {
        "QwenImageTransformer2DModel": Streams(("transformer_blocks",), text=1, joint=True, text_first=True)
    }

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        t, h, w, others = _shape(denoiser, call)
        text = call["encoder_hidden_states"].shape[1] + others
        return Grid(t, h, w, text=text, text_first=True, opposite=others)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        rows, columns = image_tokens(denoiser, size, 2 * getattr(pipe, "vae_scale_factor", 8))
        return Grid(1, rows, columns, text=MAX_TEXT, text_first=True)


def _shape(denoiser: Any, call: dict[str, Any]) -> tuple[int, int, int, int]:
    """(t, h, w, others): the tokens of the image, and how many tokens of other images follow them."""
    images = call["img_shapes"]
    images = images[0] if isinstance(images, list) else images  # as the model's rotary tables: of the first sample
    if not isinstance(images, list):
        images = [images]
    t, h, w = images[0]
    others = images[1:]
    if denoiser.config.use_layer3d_rope:  # the layers, and last the image that is split into them
        while len(others) > 1 and tuple(others[0]) == (t, h, w):
            others = others[1:]
        t = t * (len(images) - len(others))
    left = sum(frames * height * width for frames, height, width in others)
    tokens = call["hidden_states"].shape[1]
    if t * h * w + left != tokens:
        raise TilewiseError(
            f"img_shapes: {call['img_shapes']} has {t * h * w + left} tokens a sample, hidden_states {tokens}"
        )
    return t, h, w, left


register_family(QwenImageFamily())
