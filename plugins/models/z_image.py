"""Z-Image: refiner blocks for image and text, then blocks over [image | padding | text | padding].

The image's tokens are padded to a multiple of 32 with tokens that take part in attention; they count as text. Prompts are padded
in the same way, and then to the longest of the batch, with a mask over keys. The image's refiners run on the image and its
padding; the text's stay as they are. Rotary tables are made inside ``forward``; ``_prepare_sequence``, which both streams pass
through, returns them.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import PREPARE_SEQUENCE
from tilewise.plugins.hooks.forward_override import MethodOverride
from tilewise.plugins.models.common.family import AttentionLayer, Family, Reorder, Size, UnreadableGridError
from tilewise.plugins.models.common.image import StreamOrder, by_name, image_tokens
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import within_positions

PARAMETERS = (
    "x", "t", "cap_feats", "return_dict", "controlnet_block_samples", "siglip_feats", "image_noise_mask", "patch_size",
    "f_patch_size",
)  # fmt: skip
MULTIPLE = 32  # both streams are padded to a multiple of it
MAX_TEXT = 512  # the pipelines' max_sequence_length; they do not pad prompts to it


class ZImageFamily(Family):
    name = "z_image"
    classes: tuple[str, ...] = ("ZImageTransformer2DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        call = by_name(PARAMETERS, args, kwargs)
        images = call["x"]
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise UnreadableGridError(
                f"the images of a batch have different sizes ({sorted(sizes)}), and so no grid in common"
            )
        t, h, w = _image_grid(call)
        return Grid(t, h, w, text=sum(_lengths(call)) - t * h * w)

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if isinstance(by_name(PARAMETERS, args, kwargs)["x"][0], list):
            return "several images a sample (omni mode) stand in one sequence, which has no grid"
        return None

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return (1 - by_name(PARAMETERS, args, kwargs)["t"]) * 1000  # given in 0 (noise) … 1

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        model: Any = denoiser
        heads, head_dim = model.n_heads, model.dim // model.n_heads
        blocks = [
            (f"{kind}.{i}", block)
            for kind in ("noise_refiner", "layers")
            for i, block in enumerate(getattr(model, kind))
        ]
        return [
            AttentionLayer(f"{name}.attention", block.attention, number, heads, head_dim)
            for number, (name, block) in enumerate(blocks)
        ]

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        model: Any = denoiser
        lengths = _LENGTHS.setdefault(reorder, [])

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            call = by_name(PARAMETERS, args, kwargs)
            lengths[:] = [0, 0] if self.refuses(module, args, kwargs) else _lengths(call)
            samples = call.get("controlnet_block_samples")
            if samples is None:
                return None
            return (), {**call, "controlnet_block_samples": {i: reorder.into(sample) for i, sample in samples.items()}}

        def prepare(feats: Any, pos_ids: Any, inner_pad_mask: Any, pad_token: Any, *args: Any, **kwargs: Any) -> Any:
            # The hidden states (B, n, C) and rotary tables (B, n, D) of one stream; the blocks get both streams joined.
            x, tables, *rest = stock(model, feats, pos_ids, inner_pad_mask, pad_token, *args, **kwargs)
            if pad_token is model.x_pad_token:
                order = StreamOrder(reorder, x.shape[1], lengths[1], x.device, text_first=False)
                x, tables = order.enter(x), order.enter(tables)
            return (x, tables, *rest)

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return reorder.back(output)

        stock = getattr(type(model), PREPARE_SEQUENCE)
        return [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            MethodOverride(model, PREPARE_SEQUENCE, prepare),
            *(final.register_forward_hook(leave) for final in model.all_final_layer.values()),
        ]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        lengths = _LENGTHS.setdefault(reorder, [])

        def order_of(x: torch.Tensor) -> StreamOrder:
            # A refiner's attention has the image and its padding, the others' all tokens.
            return StreamOrder(reorder, x.shape[1], sum(lengths) - x.shape[1], x.device, text_first=False)

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            order = order_of(args[0])
            return (order.leave(args[0]), *args[1:]), {**kwargs, "freqs_cis": order.leave(kwargs["freqs_cis"])}

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            return order_of(output).enter(output)

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        rows, columns = image_tokens(denoiser, size, model.all_patch_size[0] * getattr(pipe, "vae_scale_factor", 8))
        grid = Grid(1, rows, columns, text=_padded(rows * columns) - rows * columns + MAX_TEXT)
        return within_positions(denoiser, grid, model.config.axes_lens)


# By patch: the lengths (image and its padding, text) of the current forward, which its hooks share.
_LENGTHS: WeakKeyDictionary[Reorder, list[int]] = WeakKeyDictionary()


def _image_grid(call: dict[str, Any]) -> tuple[int, int, int]:
    """(t, h, w) in tokens of the images, all of one size."""
    frames, height, width = call["x"][0].shape[1:]
    patch, frame_patch = call.get("patch_size", 2), call.get("f_patch_size", 1)
    return frames // frame_patch, height // patch, width // patch


def _lengths(call: dict[str, Any]) -> list[int]:
    """Tokens of [image and its padding, the longest text and its padding]."""
    return [_padded(math.prod(_image_grid(call))), max(_padded(len(prompt)) for prompt in call["cap_feats"])]


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


register_family(ZImageFamily())
