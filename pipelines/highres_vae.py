"""Frames to latents and back with Wan's VAE, whole or in tiles.

The encoder is causal in time and takes frames in runs of 4 after the first, whatever its own factor: a clip whose length does not
suit that would lose its last frames, so it is lengthened with its last frame and the latents are cut: exact, as what comes later
changes nothing before. Tiles overlap by a quarter and are blended: close to the whole decode and not equal to it, as the
VAE's middle block attends over the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ENCODER_RUN = 4


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Run a block with the VAE in tiles or whole, and put its switch back."""
    before = vae.use_tiling
    vae.use_tiling = wanted
    try:
        yield
    finally:
        vae.use_tiling = before


@torch.no_grad()
def encode(pipe: Any, frames: NDArray[np.float32]) -> torch.Tensor:
    """(T, H, W, 3) in 0 … 1 to normalised latents (1, C, t, h, w), float32 on the VAE's device: the mean, not a sample."""
    vae = pipe.vae
    count = len(frames)
    missing = -(count - 1) % ENCODER_RUN
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
    device = getattr(pipe, "_execution_device", vae.device)
    video = torch.from_numpy(np.ascontiguousarray(frames)).to(device, vae.dtype).permute(3, 0, 1, 2)[None] * 2 - 1
    latents = vae.encode(video).latent_dist.mode().float()
    mean, std = _statistics(vae, latents)
    kept = (count - 1) // pipe.vae_scale_factor_temporal + 1
    return ((latents - mean) / std)[:, :, :kept]


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> NDArray[np.float32]:
    """Normalised latents (1, C, t, h, w) to frames (T, H, W, 3) in 0 … 1: what the pipeline does at its end."""
    vae = pipe.vae
    device = getattr(pipe, "_execution_device", vae.device)
    latents = latents.to(device, vae.dtype)
    mean, std = _statistics(vae, latents)
    video = vae.decode(latents * std + mean, return_dict=False)[0]
    frames: NDArray[np.float32] = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    pipe.maybe_free_model_hooks()
    return frames


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(like), std.to(like)
