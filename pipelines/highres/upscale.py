"""Upscale a clip's frames or latents: the start of the second stage."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from tilewise.plugins.errors import ConfigError, unknown

Upscale: TypeAlias = Literal["bicubic", "bilinear", "lanczos", "latent"]
FRAMES = ("bicubic", "bilinear", "lanczos")


def upscale_frames(frames: NDArray[np.float32], height: int, width: int, how: str = "bicubic") -> NDArray[np.float32]:
    """(T, H, W, 3) in 0 … 1 to (T, height, width, 3), one frame at a time, clipped to 0 … 1.

    how: "bilinear" or "bicubic" (a = −0.75, PyTorch's), pixel centres aligned, or "lanczos" (a = 3, Pillow's).
    Raises ConfigError for another name.
    """
    if how not in FRAMES:
        raise unknown("way to upscale frames", how, FRAMES)
    out = np.empty((len(frames), height, width, 3), np.float32)
    for frame, target in zip(frames, out, strict=True):
        if how == "lanczos":
            channels = (Image.fromarray(np.ascontiguousarray(frame[..., c], np.float32), "F") for c in range(3))
            resized = [np.asarray(c.resize((width, height), Image.Resampling.LANCZOS)) for c in channels]
            target[:] = np.stack(resized, -1)
        else:
            x = torch.from_numpy(np.ascontiguousarray(frame, np.float32)).permute(2, 0, 1)[None]
            y = interpolate(x, (height, width), mode=how, align_corners=False)
            target[:] = y[0].permute(1, 2, 0).numpy()
    return out.clip(0, 1)


def upscale_latents(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, T, h, w) to (B, C, T, height, width), each latent frame bicubic.

    Raises ConfigError for latents of another rank.
    """
    if latents.ndim != 5:
        raise ConfigError(f"latents to upscale are (B, C, T, h, w), not {tuple(latents.shape)}")
    frames = latents.float().transpose(1, 2).flatten(0, 1)
    larger = interpolate(frames, (height, width), mode="bicubic", align_corners=False)
    return larger.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2).to(latents.dtype)
