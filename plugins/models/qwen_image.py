"""Qwen-Image, its Edit and Layered models: two streams, and one attention over [text | image] in every block.

The sizes of the images come as numbers, ``img_shapes``: of each sample the image's, then those of the images to edit, whose
tokens follow the image's in the stream. In a patched denoiser they stand before it, and count as text. A layered model makes
several images of one size, its grid's t. Prompts of unequal length are padded, with a mask of keys.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.models.common.family import AttentionLayer, Family, Reorder, Size, Streams
from tilewise.plugins.models.common.image import StreamOrder, by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family

PARAMETERS = (
    "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes", "guidance",
    "attention_kwargs", "controlnet_block_samples", "additional_t_cond",
)  # fmt: skip
MAX_TEXT = 512  # the pipelines' max_sequence_length; they pad prompts to the longest of a batch only


class QwenImageFamily(Family):
    name = "qwen_image"
    classes: tuple[str, ...] = ("QwenImageTransformer2DModel",)
    masks_per_layer = True
    streams: ClassVar = {
        "QwenImageTransformer2DModel": Streams(("transformer_blocks",), text=1, joint=True, text_first=True)
    }

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        t, h, w, others = _shape(denoiser, call)
        return Grid(t, h, w, text=call["encoder_hidden_states"].shape[1] + others, text_first=True)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"] * 1000  # given in 0 … 1

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return [
            AttentionLayer(f"transformer_blocks.{i}.attn", block.attn, i, heads, head_dim)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        model: Any = denoiser
        orders: list[StreamOrder] = []  # of the current forward

        # The arguments are reordered, not the embedder's output: a LoRA added later wraps the embedder, and a hook on it.
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = by_name(PARAMETERS, args, kwargs)
            x, text = call["hidden_states"], call["encoder_hidden_states"].shape[1]
            others = _shape(module, call)[3]
            order = StreamOrder(reorder, x.shape[1], text, x.device, text_first=True, others=others)
            orders[:] = [order]
            changed: dict[str, Any] = {"hidden_states": order.enter(x)}
            samples = call.get("controlnet_block_samples")
            if samples is not None:
                changed["controlnet_block_samples"] = [order.enter(sample) for sample in samples]
            return (), {**call, **changed}

        def rotary_tables(module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return orders[0].enter(output[0], 0), output[1]  # of the image, of the text

        def modulation(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            # (B, n): which of two timesteps a token has, the step's or, for an image to edit, 0.
            return args, {**kwargs, "modulate_index": orders[0].enter(kwargs["modulate_index"])}

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return orders.pop().leave(output)

        modulated = model.transformer_blocks if model.zero_cond_t else ()
        return [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.pos_embed.register_forward_hook(rotary_tables),
            model.norm_out.register_forward_hook(leave),
            *(block.register_forward_pre_hook(modulation, with_kwargs=True) for block in modulated),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        """As ``Family.raster_hooks``; images to edit stay before the image, as everywhere in a patched denoiser."""

        def order_of(kwargs: dict[str, Any]) -> StreamOrder:
            x, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"].shape[1]
            return StreamOrder(reorder, x.shape[1], text, x.device, text_first=True)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            order, (image, text) = order_of(kwargs), kwargs["image_rotary_emb"]
            tables = order.leave(image, 0), text
            return args, {**kwargs, "hidden_states": order.leave(kwargs["hidden_states"]), "image_rotary_emb": tables}

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> Any:
            return (order_of(kwargs).enter(output[0]), *output[1:])

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

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
