"""CogVideoX 1.0 and 1.5: text-, image- and video-to-video, and Fun control. ConsisID is based on it.

    sequence = [text, video]        one softmax over both; the video in raster order, t slowest

Self-attention is ``attn1`` of each block, which joins the two streams for its length alone. Rotary tables, one row a video
token, are an argument of the forward (models without them add positions in ``patch_embed``, before the blocks). 1.5 has patches
in time as well. Text is padded to a fixed length, without a mask: the model was trained to see the padding.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import gathered_output, split_input
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sequence_split import ONE_BLOCK, joint_plan


class CogVideoXFamily(Family):
    name = "cogvideox"
    classes: tuple[str, ...] = ("CogVideoXTransformer3DModel",)
    guidance_in_batch: ClassVar[bool] = True

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        latents = args[0] if args else kwargs["hidden_states"]  # (B, frames, C, height, width)
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        pt, p = _patch_sizes(denoiser)
        frames, _, height, width = latents.shape[1:]
        return Grid(frames // pt, height // p, width // p, text=text.shape[1], text_first=True)

    split_needs_patch: ClassVar = True

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        return joint_plan("transformer_blocks.0", image_rotary_emb=[split_input(0, 2)] * 2)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return torch.as_tensor(args[2] if len(args) > 2 else kwargs["timestep"])

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        config: Any = denoiser.config
        pt, p = _patch_sizes(denoiser)
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 4)
        # The pipelines' own check asks for 8, whatever the VAE; what does not fill whole patches then fails in mid-denoise.
        pixels = math.lcm(8, spatial * p)
        sample = {"height": config.sample_height * spatial, "width": config.sample_width * spatial}
        wrong = []
        for name, given, step, offset in (
            ("height", size.height, pixels, 0),
            ("width", size.width, pixels, 0),
            ("frames", size.frames, temporal, 1),
        ):
            nearest = max(offset or step, offset + step * round((given - offset) / step))
            rule = f"a multiple of {step}" if offset == 0 else f"{step}·k + 1"
            if name in sample and config.use_learned_positional_embeddings:
                nearest, rule = sample[name], "the size that its positions were learned for"
            elif name in sample and _patch_size_t(denoiser) is not None and given > sample[name]:
                # The pipelines of 1.5 cut rotary tables out of those of the sample size.
                nearest, rule = sample[name] // step * step, f"at most {sample[name]}"
            if given != nearest:
                wrong.append(f"{name}={given} must be {rule}, the nearest is {nearest}")
        if wrong:
            raise ConfigError(f"{type(denoiser).__name__} does not take this size: {'; '.join(wrong)}")
        latents = (size.frames - 1) // temporal + 1
        # Pipelines of 1.5 add latent frames until patches in time are whole, and drop them from the result.
        return Grid(
            -(-latents // pt),
            size.height // spatial // p,
            size.width // spatial // p,
            text=config.max_text_seq_length,
            text_first=True,
        )


class ConsisIDFamily(CogVideoXFamily):
    """ConsisID: CogVideoX with cross-attention from each video token to a face, between the blocks."""

    name = "consisid"
    classes: tuple[str, ...] = ("ConsisIDTransformer3DModel",)

    def context_parallel_plan(self, denoiser: nn.Module) -> dict[str, Any] | str:
        blocks: Any = denoiser.transformer_blocks
        if len(blocks) < 2:
            return ONE_BLOCK
        plan = joint_plan("transformer_blocks.0", image_rotary_emb=[split_input(0, 2)] * 2)
        del plan["proj_out"]  # the forward cuts the text off behind the blocks: all of it must be there
        return {**plan, f"transformer_blocks.{len(blocks) - 1}": [gathered_output(1, 3)] * 2}


def _patch_sizes(denoiser: nn.Module) -> tuple[int, int]:
    """Patch size in time, and on h and w."""
    config: Any = denoiser.config
    return _patch_size_t(denoiser) or 1, config.patch_size


def _patch_size_t(denoiser: nn.Module) -> int | None:
    """None for CogVideoX 1.0, and for ConsisID, whose config has no entry of that name."""
    return getattr(denoiser.config, "patch_size_t", None)


register_family(CogVideoXFamily())
register_family(ConsisIDFamily())
