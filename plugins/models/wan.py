"""Wan 2.1 and 2.2: text-, image- and video-to-video, both transformers of a 2.2 pipeline, per-token timesteps (5B), VACE and
Animate.

Self-attention is ``attn1`` of each block, over the video tokens alone in raster order (t slowest); text and image conditions
enter through cross-attention (``attn2``), which stays as it is. Rotary tables come from ``rope``, one row a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import gathered_output, split_input
from tilewise.plugins.models.common.family import AttentionLayer, Family, FusedState, Size, Streams
from tilewise.plugins.models.common.forward_arguments import contiguous_hidden_states
from tilewise.plugins.models.common.lead_timesteps import lead_by_token
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.rotary import Rotary
from tilewise.plugins.models.common.sizes import Rule, refuse, within_positions, wrong_sizes

ROPE_BASE = 10_000.0  # of every Wan model; a rotary module does not keep it


class WanFamily(Family):
    name = "wan"
    prompt_tokens: ClassVar[bool] = True
    classes: tuple[str, ...] = ("WanTransformer3DModel",)
    streams: ClassVar = {"WanTransformer3DModel": Streams(("blocks",), text=2)}
    stacks: ClassVar[tuple[str, ...]] = ("blocks",)
    pixels = 16  # what the pipelines ask heights and widths to be a multiple of

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = args[0] if args else kwargs["hidden_states"]  # (B, C, frames, height, width)
        return Grid(*(n // p for n, p in zip(latents.shape[2:], _patch_size(denoiser), strict=True)))

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return args[1] if len(args) > 1 else kwargs["timestep"]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.blocks
        return [contiguous_hidden_states(blocks[0])]

    def rotary(self, denoiser: nn.Module) -> Rotary | str:
        rope: Any = denoiser.rope
        if _patch_size(denoiser)[0] != 1:
            return f"{type(denoiser).__name__} has {_patch_size(denoiser)[0]} latent frames a token"
        axes = (rope.t_dim, rope.h_dim, rope.w_dim)
        t, h, w = (ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in axes)
        if rope.freqs_sin.is_meta:  # without weights there is nothing to compare
            return Rotary(rope, (t, h, w))
        # θ is computed, as the tables' own rounding would be multiplied by the frame number. At position 1 they show θ.
        shown = torch.atan2(rope.freqs_sin[1].double(), rope.freqs_cos[1].double()).cpu()[0::2]
        if not torch.allclose(shown, torch.cat([t, h, w]), atol=0.01):
            return f"the rotary frequencies of {type(denoiser).__name__} are not those of base {ROPE_BASE:.0f}"
        return Rotary(rope, (t, h, w))

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        # Wan 2.2 TI2V-5B was trained with a picture, one latent frame, in front (arXiv 2503.20314 and its model card).
        return int(bool(pipe.config.get("expand_timesteps")))

    def with_lead_timesteps(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], lead: torch.Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        grid = self.grid(denoiser, args, kwargs)
        timestep = lead_by_token(self.timestep(args, kwargs), lead, grid.h * grid.w, grid.t)
        if len(args) > 1:
            return (args[0], timestep, *args[2:]), kwargs
        return args, {**kwargs, "timestep": timestep}

    # fused.wan needs diffusers' classes: imported where there is a denoiser, which has brought them.

    def fuse(self, denoiser: nn.Module, state: FusedState) -> list[Any]:
        from tilewise.plugins.models.fused.wan import fuse_blocks

        return [*super().fuse(denoiser, state), *fuse_blocks(denoiser, state)]

    def self_attention(self, layer: AttentionLayer) -> Callable[..., torch.Tensor | None] | None:
        from tilewise.plugins.models.fused.wan import wan_self_attention

        return wan_self_attention

    def notes(self, denoiser: nn.Module, *, fuse: bool, dense: Collection[str]) -> list[str]:
        from tilewise.plugins.models.fused.wan import feed_forward_reasons, stock_reasons

        if not fuse:
            return []
        blocks: Any = denoiser.blocks
        known_dense = {number for number in range(len(blocks)) if f"blocks.{number}.attn1" in dense}
        parts = {
            "fused kernels are off": stock_reasons(denoiser, known_dense),
            "the feed-forward runs its first layer and its GELU one by one": feed_forward_reasons(denoiser),
        }
        return [
            f"{what} in {count} of {len(blocks)} blocks: {reason}"
            for what, reasons in parts.items()
            for reason, count in reasons.items()
        ]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        pt, ph, pw = _patch_size(denoiser)
        spatial, temporal = _vae_factors(pipe)
        wrong = wrong_sizes(
            # The pipelines' own check asks for 16, whatever the VAE; then they round down to whole patches, silently.
            Rule("height", size.height, math.lcm(self.pixels, spatial * ph)),
            Rule("width", size.width, math.lcm(self.pixels, spatial * pw)),
            Rule("frames", size.frames, temporal * pt, 1),
        )
        refuse(denoiser, wrong)
        frames = (size.frames - 1) // temporal + 1
        grid = Grid(frames // pt, size.height // spatial // ph, size.width // spatial // pw)
        config: Any = denoiser.config
        return within_positions(denoiser, grid, (config.rope_max_seq_len,) * 3)


class WanVACEFamily(WanFamily):
    """VACE: control blocks run first, each beside the main block of ``vace_layers`` that its output is added to.

    They have self-attention of their own over the control tokens, on the same grid, and belong to that block's number. Each
    reference image is one more latent frame, which a size does not tell.
    """

    classes: tuple[str, ...] = ("WanVACETransformer3DModel",)
    pixels = 1

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        control = {name: split_input(1, 3) for name in ("hidden_states", "control_hidden_states")}
        return {
            "rope": {n: split_input(1, 4, output=True) for n in (0, 1)},
            "vace_blocks.0": control,  # the others go on from it, and do not look at their hidden states
            "blocks.0": {"hidden_states": split_input(1, 3)},
            "proj_out": gathered_output(1, 3),
        }

    def rotary(self, denoiser: nn.Module) -> Rotary | str:
        return "VACE's control blocks run over a whole control video"

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        return "VACE is conditioned by its control video"

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        config: Any = denoiser.config
        blocks: Any = denoiser.vace_blocks
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        control = [
            AttentionLayer(f"vace_blocks.{i}.attn1", block.attn1, config.vace_layers[i], heads, head_dim)
            for i, block in enumerate(blocks)
        ]
        return [*super().layers(denoiser), *control]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.vace_blocks
        return [*super().hooks(denoiser), contiguous_hidden_states(blocks[0])]


class WanAnimateFamily(WanFamily):
    """Animate: Wan with face adapters between the blocks, which stay as they are.

    ``frames`` of a size is the length of one segment (``segment_frame_length``); the reference image is a latent frame more.
    """

    classes: tuple[str, ...] = ("WanAnimateTransformer3DModel",)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return "its face adapters attend frame by frame, and a rank's tokens are no whole frames"

    def rotary(self, denoiser: nn.Module) -> Rotary | str:
        return "Animate's face adapters run over a whole segment"

    def clean_frames(self, denoiser: nn.Module, pipe: Any) -> int | str:
        return "Animate has a reference image in front"

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        grid = super().grid_of_size(denoiser, pipe, size)
        return Grid(grid.t + 1, grid.h, grid.w)


def _patch_size(denoiser: nn.Module) -> tuple[int, int, int]:
    config: Any = denoiser.config
    return tuple(config.patch_size)


def _vae_factors(pipe: Any) -> tuple[int, int]:
    """(pixels per latent on h and w, frames per latent frame): the pipeline's, or Wan 2.1's where only a denoiser is known."""
    return getattr(pipe, "vae_scale_factor_spatial", 8), getattr(pipe, "vae_scale_factor_temporal", 4)


register_family(WanFamily())
register_family(WanVACEFamily())
register_family(WanAnimateFamily())
