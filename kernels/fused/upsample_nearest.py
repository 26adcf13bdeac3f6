"""Nearest-neighbor upsampling of frames by 2 in height and width, and the frames that a time convolution made put in order.

    out[b, K·t + k, 2h + i, 2w + j, c] = x[b, t, h, w, k·C + c]         k < K, i and j in {0, 1}

A copy, and so exact in every dtype. With K = 2 it takes both frames that an upsampling convolution made of each out of its
channels on the way, where the separate operators write them once more.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import FLOATS, runs_triton


def upsample_nearest(x: torch.Tensor, frames: int = 1) -> torch.Tensor:
    """Frames of twice the height and width.

    Args:
        x: (B, T, H, W, K·C) float16, bfloat16 or float32, contiguous.
        frames: K, how many frames lie side by side in the channels of one.

    Returns:
        (B, K·T, 2H, 2W, C), contiguous, in x's dtype.

    Raises:
        ValueError: shapes or strides that do not fit.
        TypeError: another dtype.
    """
    where = f"upsample_nearest(x {tuple(x.shape)}, frames={frames})"
    if x.ndim != 5 or frames < 1 or x.shape[4] % frames or not x.is_contiguous():
        raise ValueError(f"{where}: x must be (B, T, H, W, frames·C) and contiguous, got strides {x.stride()}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{where}: takes float16, bfloat16 and float32, got {x.dtype}")
    if runs_triton(x.device):
        from tilewise.kernels.fused.triton_upsample_nearest import triton_upsample_nearest

        return triton_upsample_nearest(x, frames)
    return upsample_nearest_reference(x, frames)


def upsample_nearest_reference(x: torch.Tensor, frames: int) -> torch.Tensor:
    """The formula, by broadcasting."""
    B, T, H, W, KC = x.shape
    C = KC // frames
    source = x.view(B, T, H, W, frames, C).permute(0, 1, 4, 2, 3, 5)[:, :, :, :, None, :, None]
    return source.expand(B, T, frames, H, 2, W, 2, C).reshape(B, T * frames, 2 * H, 2 * W, C).contiguous()
