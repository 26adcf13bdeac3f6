"""The decoder of a tiny video autoencoder (TAEHV, https://github.com/madebyollin/taehv), frame by frame in time.

    latent (C, h, w)  →  conv  →  3 stages of memory blocks, ×2 in height and width, × 1 or 2 in time  →  conv  →  RGB frames

Convolutions see one frame each. Only memory blocks look back: at their own input of the frame before, zeros before the first one.
So a clip needs one frame for each block to go on, and the decoder is causal. Latents are those of the denoiser, normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BLOCKS = 3  # memory blocks of a stage
STAGES = 3
RGB = 3


@dataclass(frozen=True)
class TinyShape:
    """The size of a decoder.

    channels: of a latent. widths: channels of the stages, and behind the last one. growth: frames that each stage makes of one.
    patch: side of the square of pixels that the last convolution writes at once. wide: the variant with depthwise convolutions,
    published as "super".
    """

    channels: int
    widths: tuple[int, int, int, int]
    growth: tuple[int, int, int]
    patch: int = 1
    wide: bool = False

    @property
    def spatial(self) -> int:
        """Pixels to a latent, along height and width."""
        return 2**STAGES * self.patch

    @property
    def temporal(self) -> int:
        """Frames to a latent."""
        return self.growth[0] * self.growth[1] * self.growth[2]


class MemoryBlock(nn.Module):
    """x + f(x, x of the frame before), with ReLU behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2 * width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.first(torch.cat([x, before], 1)))
        return F.relu(self.third(F.relu(self.second(inner))) + x)


class WideMemoryBlock(nn.Module):
    """x + f(x, x of the frame before): a depthwise convolution of 7 × 7 and an inverted bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False)
        self.wider = nn.Conv2d(2 * width, 4 * width, 1)
        self.narrower = nn.Conv2d(4 * width, width, 1, bias=False)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        inner = self.depthwise(torch.cat([x, before], 1))
        return self.narrower(F.relu(self.wider(inner))) + x


class Stage(nn.Module):
    """Memory blocks, then twice the height and width, and ``growth`` frames for each one."""

    def __init__(self, width: int, after: int, growth: int, wide: bool) -> None:
        super().__init__()
        kind = WideMemoryBlock if wide else MemoryBlock
        self.blocks = nn.ModuleList(kind(width) for _ in range(BLOCKS))
        self.growth, self.wide = growth, wide
        if wide:
            self.conv = nn.Conv2d(width, 4 * after, 3, padding=1)
            self.grow = nn.Conv2d(after, growth * after, 1, bias=False)
        else:
            self.grow = nn.Conv2d(width, growth * width, 1, bias=False)
            self.conv = nn.Conv2d(width, after, 3, padding=1, bias=False)

    def larger(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, h, w) to (N · growth, after, 2 h, 2 w)."""
        if self.wide:
            return self._frames(F.pixel_shuffle(F.relu(self.conv(x)), 2))
        # Published is the other order, upsampling before the convolution of 1 × 1: the same pixels for four times the work.
        return self.conv(F.interpolate(self._frames(x), scale_factor=2, mode="nearest"))

    def _frames(self, x: torch.Tensor) -> torch.Tensor:
        return self.grow(x).unflatten(1, (self.growth, -1)).flatten(0, 1)


class TinyDecoder(nn.Module):
    """One latent after another of a clip to its frames; see ``TinyStreamingDecoder`` for whole clips and chunks."""

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape = shape
        widths, wide = shape.widths, shape.wide
        self.conv_in = nn.Conv2d(shape.channels, widths[0], 1 if wide else 3, padding=0 if wide else 1, bias=not wide)
        self.stages = nn.ModuleList(
            Stage(widths[i], widths[i + 1], growth, wide) for i, growth in enumerate(shape.growth)
        )
        self.conv_out = nn.Conv2d(widths[-1], RGB * shape.patch**2, 3, padding=1)

    def forward(
        self, latent: torch.Tensor, memory: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The frames of one latent.

        Args:
            latent: (B, C, h, w), normalised. memory: of each memory block, from the call before; None before the first latent.

        Returns:
            Frames (B, 3, temporal, H, W) in −1 … 1, and the memory for the next call.
        """
        wide, batch = self.shape.wide, len(latent)
        stages: Any = self.stages
        after: list[torch.Tensor | None] = []
        x = self.conv_in(latent) if wide else F.relu(self.conv_in(torch.tanh(latent / 3) * 3))
        for stage in stages:
            for block in stage.blocks:
                frames = x.unflatten(0, (batch, -1))
                last = memory[len(after)]
                first = torch.zeros_like(frames[:, :1]) if last is None else last[:, None]
                after.append(frames[:, -1].clone())  # a view would keep all frames
                x = block(x, torch.cat([first, frames[:, :-1]], 1).flatten(0, 1))
            x = stage.larger(x)
        x = self.conv_out(x if wide else F.relu(x))
        pixels = F.pixel_shuffle(x, self.shape.patch).unflatten(0, (batch, -1)).transpose(1, 2)
        return pixels.clamp(0.0, 1.0) * 2 - 1, after
