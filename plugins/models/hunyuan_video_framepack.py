"""FramePack on HunyuanVideo: denoises a window of frames that follows a history of earlier frames, at three scales.

    the model's order          [history ÷ 4 | history ÷ 2 | clean frames | video | image | text]
    the blocks' order, here    [video | history ÷ 4 | history ÷ 2 | clean frames | image | text]

Every query sees the history, image and text tokens, and they see everything: in a plan they count as text. Attention gives the
same result in any token order, so the history moves behind the video once, where the model joins the two, and back before the
model cuts it off.

A batch of one comes without padding and without a mask, more come with a mask over keys alone. Its blocks are HunyuanVideo's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import PACK_HISTORY
from tilewise.plugins.hooks.forward_override import MethodOverride
from tilewise.plugins.hooks.stand_in import is_stand_in
from tilewise.plugins.models.common.family import Reorder, Size
from tilewise.plugins.models.common.forward_arguments import argument
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.hunyuan_video import (
    PROMPT,
    HunyuanVideoFamily,
    around_blocks,
    grid_of,
    patches,
    vae_factors,
)

WINDOW = 9  # latent_window_size, in latent frames
HISTORY = (2, 2, 16)  # latent frames: clean (the first image and the newest), halved, quartered
IMAGE_TOKENS = 27**2  # of SigLIP at 384 pixels


class HunyuanVideoFramepackFamily(HunyuanVideoFamily):
    name = "hunyuan_video_framepack"
    classes: tuple[str, ...] = ("HunyuanVideoFramepackTransformer3DModel",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        prompt_mask = argument(args, kwargs, 3, "encoder_attention_mask")  # (B, text)
        image = argument(args, kwargs, 5, "image_embeds")  # (B, tokens, C)
        # A batch of one is cut to its prompt; the model waits for the device to know its length, and so must this.
        prompt = int(prompt_mask.sum(dtype=torch.int)) if latents.shape[0] == 1 else prompt_mask.shape[1]
        history = 0
        for scale, (position, name) in enumerate(
            ((8, "latents_clean"), (10, "latents_history_2x"), (12, "latents_history_4x"))
        ):
            part = args[position] if len(args) > position else kwargs.get(name)
            if part is not None:
                history += _history_tokens(part.shape[2:], scale)
        return Grid(*patches(denoiser, latents.shape[2:]), text=history + image.shape[1] + prompt)

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        if not reorder.reorders:
            return []  # if tokens are never reordered, the history can stay where it is
        model: Any = denoiser
        pack = _Packing(model, reorder)
        handles: list[Any] = [pack.handle, *around_blocks(denoiser, reorder)]
        for layer in self.layers(denoiser):
            handles += pack.as_stock_has_it(layer.module)
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        return [*handles, *(block.register_forward_hook(pack.leave) for block in blocks[-1:])]

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        return []  # ``_Packing.as_stock_has_it`` has put hooks on every layer, which act where the processor is not ours

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        spatial, temporal = vae_factors(pipe, 8)
        checked = grid_of(denoiser, size, spatial, temporal, text=0, smallest=16, any_length=True)
        latent = size.height // spatial, size.width // spatial
        history = sum(_history_tokens((frames, *latent), scale) for scale, frames in enumerate(HISTORY))
        encoder = getattr(getattr(pipe, "image_encoder", None), "config", None)
        image = IMAGE_TOKENS if encoder is None else (encoder.image_size // encoder.patch_size) ** 2
        window, _, _ = patches(denoiser, (WINDOW, *latent))
        return Grid(window, checked.h, checked.w, text=history + image + PROMPT)


def _history_tokens(latent: Any, scale: int) -> int:
    """Tokens of a history of that many latent (frames, rows, columns): patches of (1, 2, 2), (2, 4, 4) or (4, 8, 8)."""
    t, h, w = latent
    if scale == 0:
        return t * (h // 2) * (w // 2)
    size = 2**scale
    return math.ceil(t / size) * math.ceil(h / (2 * size)) * math.ceil(w / (2 * size))


class _Packing:
    """Moves the history behind the video and back. ``handle.remove()`` takes the override off."""

    def __init__(self, denoiser: Any, reorder: Reorder) -> None:
        self.reorder = reorder
        self.stock: Callable[..., Any] = getattr(denoiser, PACK_HISTORY)
        self.video = 0  # video tokens of the current forward

        def pack(video: torch.Tensor, *rest: Any, **options: Any) -> Any:
            return self.pack(video, *rest, **options)

        self.handle = MethodOverride(denoiser, PACK_HISTORY, pack)

    def pack(
        self, video: torch.Tensor, clean: Any, half: Any, quarter: Any, tables: Any, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """``_pack_history_states``: (B, video, C) and its (video, D) tables, joined with the history's, which follow here."""
        self.video = video.shape[1]
        tables = tuple(self.reorder.into(table, 0) for table in tables)
        joined, tables = self.stock(video, clean, half, quarter, tables, *rest, **options)
        return self._video_first(joined, 1), tuple(self._video_first(table, 0) for table in tables)

    def leave(self, block: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> Any:
        """A hook for the last block: after it the model takes the last tokens for the video."""
        return (self._video_last(output[0], 1), *output[1:])

    def as_stock_has_it(self, attn: nn.Module) -> list[Any]:
        """Hooks that give an attention module the model's own order if its processor is not ours."""

        def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if is_stand_in(module.processor):
                return None
            cos, sin = kwargs["image_rotary_emb"]
            tables = (self._raster(cos, 0), self._raster(sin, 0))
            hidden_states = self._raster(kwargs["hidden_states"], 1)
            return args, {**kwargs, "hidden_states": hidden_states, "image_rotary_emb": tables}

        def leave(module: Any, args: tuple, output: tuple[torch.Tensor, ...]) -> Any:
            if is_stand_in(module.processor):
                return None
            x = self._video_first(output[0], 1)
            ordered = self.reorder.into(x[:, : self.video])
            return (torch.cat([ordered, x[:, self.video :]], dim=1), *output[1:])

        return [attn.register_forward_pre_hook(enter, with_kwargs=True), attn.register_forward_hook(leave)]

    def _raster(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        video, history = x.split([self.video, x.shape[dim] - self.video], dim)
        return torch.cat([history, self.reorder.back(video, dim)], dim)

    def _video_first(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        history, video = x.split([x.shape[dim] - self.video, self.video], dim)
        return torch.cat([video, history], dim)

    def _video_last(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        video, history = x.split([self.video, x.shape[dim] - self.video], dim)
        return torch.cat([history, video], dim)


register_family(HunyuanVideoFramepackFamily())
