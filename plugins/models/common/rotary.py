"""How a family's keys turn with their position, so that a KV cache can write them at any position and move them later.

Channel pair j of an axis turns by position · θ_j (RoFormer, arXiv 2104.09864, §3.2). Attention depends on differences of
positions alone. Angles are computed in float64 and taken mod 2π, so that frame 10⁷ is as exact as frame 12; a model's own table
ends after about 1,024 positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding over (t, h, w), as Wan has it: axes one after another, a pair of neighbouring channels each θ.

    Attributes:
        module: makes the denoiser's tables: called with its hidden states, returns (cos, sin), each (1, S, 1, D) with both
            channels of a pair alike, S in raster order.
        frequencies: θ of each axis, (d/2,) float64 each; the channels of t come first.
    """

    module: nn.Module
    frequencies: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @property
    def time_channels(self) -> int:
        """How many channels turn with the frame; they come first."""
        return 2 * len(self.frequencies[0])

    def time_angles(self, frames: Sequence[int]) -> torch.Tensor:
        """(n, d_t/2) float64 in [0, 2π): by how much each pair of channels of t turns at each frame."""
        # A product of a large frame number and θ in float64 has an error of 1e-16 · angle: at frame 10⁷, 1e-9.
        at = torch.tensor(list(frames), dtype=torch.float64)[:, None]
        return torch.remainder(at * self.frequencies[0], 2 * math.pi)

    def tables(self, frames: Sequence[int], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (1, frames · height · width, 1, D) float64 in raster order, for rows and columns from 0."""
        axes = [self.time_angles(frames)]
        for length, theta in zip((height, width), self.frequencies[1:], strict=True):
            axes.append(torch.arange(length, dtype=torch.float64)[:, None] * theta)
        shape = (len(frames), height, width)
        parts = []
        for axis, angle in enumerate(axes):
            view = [1, 1, 1, 2 * angle.shape[1]]
            view[axis] = shape[axis]
            parts.append(angle.repeat_interleave(2, 1).view(view).expand(*shape, -1))
        angles = torch.cat(parts, -1).reshape(1, math.prod(shape), 1, -1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """x (…, d) with each pair of neighbouring channels turned; cos, sin: (…, d/2), broadcast. back: by the negative angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    if back:
        sin = -sin
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
