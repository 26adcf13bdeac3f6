"""Z-Image: refiner blocks for image and text, then blocks over [image | padding | text | padding].

The image's tokens are padded to a multiple of 32 with tokens that take part in attention; they count as text. Prompts are padded
in the same way, and then to the longest of the batch, with a mask over keys. The image's refiners run on the image and its
padding; the text's stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import AttentionLayer, Family, Size, UnreadableGridError
from tilewise.plugins.models.common.image import by_name, image_tokens
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
    guidance_in_batch: ClassVar[bool] = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "its forward joins text and image sample by sample between two stacks of blocks, which no plan can split"

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

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        rows, columns = image_tokens(denoiser, size, model.all_patch_size[0] * getattr(pipe, "vae_scale_factor", 8))
        grid = Grid(1, rows, columns, text=_padded(rows * columns) - rows * columns + MAX_TEXT)
        return within_positions(denoiser, grid, model.config.axes_lens)


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
