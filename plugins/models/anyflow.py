"""AnyFlow: Wan's architecture for any number of steps, text- and image-to-video; latents with their frames before their channels.

Its causal model (FAR) has a mask over chunks of frames, and is not served.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.family import Family, Size
from tilewise.plugins.models.common.forward_arguments import contiguous_hidden_states
from tilewise.plugins.models.common.image import by_name
from tilewise.plugins.models.common.registry import register_family
from tilewise.plugins.models.common.sizes import Rule, refuse, within_positions, wrong_sizes

PARAMETERS = ("hidden_states", "timestep", "r_timestep", "encoder_hidden_states", "encoder_hidden_states_image")


class AnyFlowFamily(Family):
    name = "anyflow"
    classes: tuple[str, ...] = ("AnyFlowTransformer3DModel",)
    stacks: ClassVar[tuple[str, ...]] = ("blocks",)

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        model: Any = denoiser
        frames, _, height, width = by_name(PARAMETERS, args, kwargs)["hidden_states"].shape[1:]
        _, ph, pw = model.config.patch_size
        return Grid(frames, height // ph, width // pw)

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        return by_name(PARAMETERS, args, kwargs)["timestep"]

    def hooks(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.blocks
        return [contiguous_hidden_states(blocks[0])]

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        model: Any = denoiser
        _, ph, pw = model.config.patch_size
        spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
        temporal = getattr(pipe, "vae_scale_factor_temporal", 4)
        refuse(
            denoiser,
            wrong_sizes(
                Rule("height", size.height, spatial * ph),
                Rule("width", size.width, spatial * pw),
                Rule("frames", size.frames, temporal, 1),
            ),
        )
        grid = Grid((size.frames - 1) // temporal + 1, size.height // spatial // ph, size.width // spatial // pw)
        return within_positions(denoiser, grid, (model.config.rope_max_seq_len,) * 3)


register_family(AnyFlowFamily())
