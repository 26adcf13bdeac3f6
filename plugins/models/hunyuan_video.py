"""HunyuanVideo: text-, image- and (SkyReels) image-to-video. Video and text share each self-attention: [video, text].

    transformer_blocks          two streams, video and text, each with its own projections; one softmax over both
    single_transformer_blocks   one stream, which is cut from and joined to the text in every block; the same softmax

Video tokens are in raster order (t slowest) and text is always last. Every call brings a mask over keys alone, which hides the
padding of the prompt. Rotary tables, one row a video token, come from ``rope``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import change_arguments
from tilewise.plugins.models.common.family import Family, Size, Streams
from tilewise.plugins.models.common.forward_arguments import argument, contiguous_hidden_states
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import joint_plan
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes

PROMPT = 256  # max_sequence_length of the pipelines
IMAGE_PROMPT = 252  # the same where the prompt holds an image: four tokens of the template are cut out of it
IMAGE_TOKENS = {"latent_concat": 576 // 2, "token_replace": 576 // 4}  # of LLaVA's 576, every second or fourth is kept


class HunyuanVideoFamily(Family):
    name = "hunyuan_video"
    classes: tuple[str, ...] = ("HunyuanVideoTransformer3DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention: ClassVar = "attn"
    streams: ClassVar = {
        "HunyuanVideoTransformer3DModel": Streams(
            ("transformer_blocks", "single_transformer_blocks"), text=2, joint=True
        )
    }

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, frames, height, width)
        text = argument(args, kwargs, 2, "encoder_hidden_states")  # (B, text, C)
        return Grid(*patches(denoiser, latents.shape[2:]), text=text.shape[1])

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return argument(args, kwargs, 1, "timestep")

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return joint_plan(next(f"{stack}.0" for stack in self.stacks if getattr(denoiser, stack)), "rope")

    def on_split(self, denoiser: nn.Module, share: Callable[[int], range]) -> None:
        config: Any = denoiser.config
        if getattr(config, "image_condition_type", None) != "token_replace":
            return
        mine = 0  # of the first frame's tokens, which the blocks count: they have a timestep of their own

        def count(denoiser: nn.Module, given: dict[str, Any]) -> None:
            nonlocal mine
            t, h, w = patches(denoiser, given["hidden_states"].shape[2:])
            tokens = share(t * h * w)
            mine = max(min(h * w, tokens.stop) - tokens.start, 0)

        change_arguments(denoiser, count, "tilewise_first_frame")
        for stack in self.stacks:
            for block in getattr(denoiser, stack):
                change_arguments(block, lambda _, given: given.update(num_tokens=mine), "tilewise_first_frame")

    def whole_attention(self, denoiser: nn.Module) -> list[nn.Module]:
        model: Any = denoiser
        return [model.context_embedder]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        model: Any = denoiser
        first, *_ = [block for stack in self.stacks for block in getattr(model, stack)]
        return [contiguous_hidden_states(first)]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        text = PROMPT
        # SkyReels' pipeline gives its image to the latents alone. A denoiser alone is taken for one of the image pipeline.
        if config.image_condition_type and (pipe is denoiser or hasattr(pipe, "image_processor")):
            text = IMAGE_TOKENS[config.image_condition_type] + IMAGE_PROMPT
        spatial, temporal = vae_factors(pipe, 8)
        return grid_of(denoiser, size, spatial, temporal, text=text, smallest=16)


def patches(denoiser: nn.Module, latent: Any) -> tuple[int, int, int]:
    """Tokens along (t, h, w) of a latent video with ``latent`` = (frames, rows, columns)."""
    config: Any = denoiser.config
    t, h, w = latent
    return t // config.patch_size_t, h // config.patch_size, w // config.patch_size


def vae_factors(pipe: Any, spatial: int) -> tuple[int, int]:
    """(pixels per latent on h and w, frames per latent frame): the pipeline's, or the released VAE's for a denoiser alone."""
    return getattr(pipe, "vae_scale_factor_spatial", spatial), getattr(pipe, "vae_scale_factor_temporal", 4)


def grid_of(
    denoiser: nn.Module,
    size: Size,
    spatial: int,
    temporal: int,
    *,
    text: int,
    smallest: int = 1,
    any_length: bool = False,
) -> Grid:
    """The grid of a size in pixels.

    Args:
        smallest: height and width must be multiples of this too, whatever the VAE.
        any_length: the pipeline takes any number of frames and generates in windows of its own.

    Raises:
        ConfigError: for a size that the pipeline refuses or would round down silently, with the nearest one that it takes.
    """
    config: Any = denoiser.config
    multiple = math.lcm(smallest, spatial * config.patch_size)
    rules = [Rule("height", size.height, multiple), Rule("width", size.width, multiple)]
    if not any_length:
        rules.append(Rule("frames", size.frames, temporal * config.patch_size_t, 1))
    refuse(denoiser, wrong_sizes(*rules))
    frames = (size.frames - 1) // temporal + 1
    return Grid(*patches(denoiser, (frames, size.height // spatial, size.width // spatial)), text=text)


register_family(HunyuanVideoFamily())
