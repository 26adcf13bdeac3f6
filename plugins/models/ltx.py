"""LTX-Video: text- and image-to-video, conditioned video, long video. LTX-2's video stream shares this code.

    sequence = [condition frames,] video [, condition frames]        the video in raster order, t slowest

Latents come packed, (B, S, C), so the grid is in the forward's ``num_frames``, ``height`` and ``width``. Pipelines that give
``video_coords`` instead have it there: the position of every token, in pixels and seconds. Condition frames that some of them put
before or after the video are not part of its grid: they count as text tokens, which see every token and which every token sees.

Self-attention is ``attn1`` of each block; the prompt enters through ``attn2``, which stays as it is. Rotary tables come from
``rope``, one row a token. A timestep per token (image-to-video, conditions) is embedded by ``time_embed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.models.common.family import Family, Size, Streams, UnreadableGridError
from tilewise.plugins.models.common.lead_timesteps import lead_by_token
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes
from tilewise.plugins.torch_compat import outside_graphs, version_of

ANY_NUMBER = 1 << 20  # of clean latent frames: trained with conditions of any length (arXiv 2501.00103, §3.5)


class LTXFamily(Family):
    name = "ltx"
    prompt_tokens: ClassVar[bool] = True
    classes: tuple[str, ...] = ("LTXVideoTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True
    streams: ClassVar = {"LTXVideoTransformer3DModel": Streams(("transformer_blocks",), text=1)}

    # The leading arguments of the denoiser's forward.
    arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        "num_frames",
        "height",
        "width",
        "rope_interpolation_scale",
        "video_coords",
    )

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        tokens = self._argument("hidden_states", args, kwargs).shape[1]
        sizes = [self._argument(name, args, kwargs) for name in ("num_frames", "height", "width")]
        # With video_coords, the model does not read the sizes; the long-video pipeline gives 1, 1, 1 then.
        if None not in sizes and math.prod(sizes) == tokens:
            return Grid(*sizes)
        return self._grid_of_coords(denoiser, tokens, sizes, args, kwargs)

    one_tensor: ClassVar = True
    per_token: ClassVar = ("timestep",)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        # diffusers' plan splits the prompt, whose mask it then cannot exchange. Left whole, no rank needs another's part.
        model: Any = denoiser
        whole = {"encoder_hidden_states", "encoder_attention_mask"}
        inputs = {name: entry for name, entry in model._cp_plan[""].items() if name not in whole}
        return {**model._cp_plan, "": inputs}

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        model: Any = denoiser
        return [block.attn2 for block in model.transformer_blocks]

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        timestep: torch.Tensor = self._argument("timestep", args, kwargs)
        return timestep

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        spatial = getattr(pipe, "vae_spatial_compression_ratio", 32)
        temporal = getattr(pipe, "vae_temporal_compression_ratio", 8)
        pixels, frames = spatial * config.patch_size, temporal * config.patch_size_t
        side = math.lcm(32, pixels)  # the pipelines' own check asks for 32, whatever the VAE
        refuse(
            denoiser,
            wrong_sizes(
                Rule("height", size.height, side),
                Rule("width", size.width, side),
                Rule("frames", size.frames, frames, 1),
            ),
        )
        latents = (size.frames - 1) // temporal + 1
        return Grid(-(-latents // config.patch_size_t), size.height // pixels, size.width // pixels)

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        return ANY_NUMBER

    def with_lead_timesteps(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], lead: torch.Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        grid = self.grid(denoiser, args, kwargs)
        timestep = lead_by_token(self.timestep(args, kwargs), lead, grid.h * grid.w, grid.t)
        at = self.arguments.index("timestep")
        if at < len(args):
            return (*args[:at], timestep, *args[at + 1 :]), kwargs
        return args, {**kwargs, "timestep": timestep}

    def _argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        at = self.arguments.index(name)
        return args[at] if at < len(args) else kwargs.get(name)

    def _grid_of_coords(
        self, denoiser: nn.Module, tokens: int, sizes: list[int | None], args: tuple, kwargs: dict[str, Any]
    ) -> Grid:
        coords = self._argument("video_coords", args, kwargs)
        if coords is None:
            raise TilewiseError(
                f"{type(denoiser).__name__}: the token grid of {tokens} packed tokens cannot be read: num_frames, height and "
                f"width are {sizes}, and there are no video_coords. Give the latents' sizes, as diffusers' pipelines do"
            )
        if coords.shape[2] != tokens:
            raise TilewiseError(
                f"{type(denoiser).__name__}: video_coords {tuple(coords.shape)} are not those of {tokens} tokens"
            )
        return grid_of_coords(coords)


# ── a grid from the positions of its tokens ───────────────────────────────────────────────────────────────────────────

# Pipelines give the same tensor at every step: it is read, which waits for the GPU, once.
_grids: Any = WeakTensorKeyDictionary()


@outside_graphs
def grid_of_coords(coords: torch.Tensor) -> Grid:
    """The grid of the tokens at ``coords``, (B, 3, S) or, as [start, end) of each token, (B, 3, S, 2): t, y and x.

    All samples have the first one's grid. Reading it costs one host synchronisation for each new tensor, and torch.compile
    a graph break.

    Raises:
        UnreadableGridError: for positions that hold no grid.
        TilewiseError: for positions that cannot be read now.
    """
    version = version_of(coords)  # None: whether it changed is not known, so it is read each time
    known = _grids.get(coords)
    if known is not None and version is not None and known[0] == version:
        grid: Grid = known[1]
        return grid
    if capturing(coords.device):
        raise TilewiseError(
            "video_coords cannot be read while a CUDA graph is being captured; run the denoiser once with the same tensor first"
        )
    grid = _read_grid(coords[0].detach().cpu().double())
    if version is not None:
        _grids[coords] = version, grid
    return grid


def _read_grid(coords: torch.Tensor) -> Grid:
    """The grid of (3, S) or (3, S, 2) positions in raster order, frames of conditions before or after it left out."""
    start = coords[..., 0] if coords.ndim == 3 else coords
    tokens = start.shape[1]
    w = _run(tokens, lambda i: bool(start[2, i] > start[2, i - 1]))
    h = _run(tokens // w, lambda i: bool(start[1, i * w] > start[1, (i - 1) * w]))
    area = w * h
    frames = start[:, : tokens // area * area].view(3, -1, area)
    t = frames[0, :, 0]
    raster = (frames[1:] == frames[1:, :1]).all(2).all(0) & (frames[0] == t[:, None]).all(1)

    def follows(i: int) -> bool:
        """Whether frame i is the next of the video that frame i − 1 belongs to."""
        if not (raster[i] and raster[i - 1] and t[i] > t[i - 1]):
            return False
        # Where a video's frame ends, its next one begins. A single frame given as a condition lasts less than a latent frame.
        return coords.ndim == 2 or bool(torch.isclose(t[i], coords[0, (i - 1) * area, 1]))

    count = len(t)
    first = _run(count, follows)
    if first == count or coords.ndim == 3 or t[0] <= 0:  # the video comes first; it begins at 0
        found = Grid(first, h, w, text=tokens - first * area)
    else:
        last = _run(count, lambda i: follows(count - i))
        found = Grid(last, h, w, text=tokens - last * area, text_first=True)
    # Rows and columns were counted at the first token: what they say must hold for all of the first frame. LTX-Video's
    # conditions have the video's rows and columns; LTX-2's references may be smaller.
    y, x = frames[1, 0].view(h, w), frames[2, 0].view(h, w)
    whole = bool(raster[0] and (y == y[:, :1]).all() and (x == x[:1]).all())
    if not whole or (coords.ndim == 2 and (tokens % area or not raster.all())):
        raise UnreadableGridError(f"video_coords of {tokens} tokens are not those of a video's latents in raster order")
    return found


def _run(count: int, goes_on: Callable[[int], bool]) -> int:
    """How many of ``count`` ≥ 1 items belong to the run that item 0 begins."""
    return next((i for i in range(1, count) if not goes_on(i)), count)


register_family(LTXFamily())
