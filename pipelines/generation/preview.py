"""Preview a clip from the latents of a running generation, with a matrix product instead of the VAE.

    RGB of a latent cell ≈ A · latent + b          x̂0 = x + (x − x_before) · σ / (σ_before − σ)

A and b are fitted once for each VAE, by least squares: made-up clips are encoded, and their latents are mapped to the mean colour
of the pixels behind each cell. x̂0 is where a flow-matching solver is heading: the straight line through its last two points,
followed to noise level σ = 0. The latents themselves would show noise until the very end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

SIZE = 64  # pixels of the made-up clips
CLIPS = 3
LATER = 2  # latent frames after the first one, which video VAEs encode alone


class LatentPreview:
    """Pictures of the run of one pipeline. One object may serve many runs, one after another; `restart` comes between.

    Raises ValueError for a pipeline without a VAE that encodes pictures.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.weight, self.bias = fit(pipe.vae)
        self._before: tuple[torch.Tensor, float] | None = None

    def restart(self) -> None:
        """Forgets the run before."""
        self._before = None

    @torch.no_grad()
    def frames(self, done: int, latents: torch.Tensor) -> NDArray[np.uint8] | None:
        """One small picture a latent frame, uint8 (T, h, w, 3), after `done` steps; None where the latents are no grid of the
        VAE's latents (models that pack them into a sequence)."""
        x = _as_video(latents, self.weight.shape[1])
        if x is None:
            return None
        clean = self._heading(done, x.float())
        rgb = torch.einsum("oc,cthw->thwo", self.weight.to(x.device), clean) + self.bias.to(x.device)
        return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def _heading(self, done: int, x: torch.Tensor) -> torch.Tensor:
        sigmas = getattr(getattr(self.pipe, "scheduler", None), "sigmas", None)
        if sigmas is None or len(sigmas) <= done or float(sigmas.max()) > 1.001:
            return x  # another kind of noise schedule, where this line leads nowhere
        sigma = float(sigmas[done])
        before, self._before = self._before, (x, sigma)
        if before is None or before[0].shape != x.shape or before[1] <= sigma:
            return x
        return x + (x - before[0]) * (sigma / (before[1] - sigma))


def fit(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, b): (3, C) and (3,), float32 on the CPU, from latents as a pipeline's denoiser sees them to RGB in 0..1."""
    if not hasattr(vae, "encode"):
        raise ValueError(f"{type(vae).__name__} encodes no pictures: there is nothing to fit a preview to")
    weight = next(vae.parameters())
    ratio = int(
        getattr(vae.config, "scale_factor_temporal", None) or getattr(vae, "temporal_compression_ratio", 1) or 1
    )
    video = any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
    clips = made_up_clips(1 + LATER * ratio if video else 1)
    inputs, colours = [], []
    with torch.no_grad():
        for clip in clips:  # (3, F, H, W) in 0..1
            x = (2 * clip - 1).to(weight.device, weight.dtype)[None]
            z = vae.encode(x if video else x[:, :, 0]).latent_dist.mode()
            z = (z if video else z[:, :, None])[0].float().cpu()
            z = normalised(z, vae.config)
            inputs.append(z.flatten(1))
            colours.append(_cells(clip, z.shape[1:]).flatten(1))
    z, rgb = torch.cat(inputs, 1).T, torch.cat(colours, 1).T
    design = torch.cat([z, torch.ones(len(z), 1)], 1)
    # A little ridge: channels that the made-up clips leave constant must not get huge weights.
    gram = design.T @ design + 1e-3 * len(z) * torch.eye(design.shape[1])
    solution = torch.linalg.solve(gram, design.T @ rgb)
    return solution[:-1].T.contiguous(), solution[-1].contiguous()


def normalised(z: torch.Tensor, config: Any) -> torch.Tensor:
    """Latents (C, …) as a VAE gives them, brought to the scale in which pipelines denoise them."""
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        shape = (-1, *([1] * (z.ndim - 1)))
        return (z - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return (z - (getattr(config, "shift_factor", None) or 0.0)) * (getattr(config, "scaling_factor", None) or 1.0)


def made_up_clips(frames: int, size: int = SIZE, clips: int = CLIPS) -> torch.Tensor:
    """(N, 3, frames, size, size) in 0..1: soft fields of colour with flat boxes on them, drifting. The same at each call."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(clips):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        fine = torch.rand(1, 3, 12, 12, generator=generator)
        soft, sharp = (F.interpolate(x, (2 * size, 2 * size), mode="bilinear")[0] for x in (coarse, fine))
        field = (soft + sharp) / 2
        field = (0.5 + 1.6 * (field - 0.5)).clamp(0, 1)
        for _ in range(6):
            top, left = (int(torch.randint(0, 2 * size - 16, (), generator=generator)) for _ in range(2))
            high, wide = (int(torch.randint(size // 8, size // 2, (), generator=generator)) for _ in range(2))
            field[:, top : top + high, left : left + wide] = torch.rand(3, 1, 1, generator=generator)
        step = [int(n) for n in torch.randint(0, 3, (2,), generator=generator)]
        shifts = [(min(step[0] * f, size), min(step[1] * f, size)) for f in range(frames)]
        made.append(torch.stack([field[:, y : y + size, x : x + size] for y, x in shifts], 1))
    return torch.stack(made)


def _cells(clip: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(3, *shape): the mean colour behind each latent cell of a clip (3, F, H, W)."""
    t, h, w = shape
    small = F.adaptive_avg_pool2d(clip.transpose(0, 1), (h, w)).transpose(0, 1)
    if t == 1:
        return small.mean(1, keepdim=True)
    # The first latent frame is the first frame, each later one an equal share of the rest.
    rest = small[:, 1:].unflatten(1, (t - 1, -1)).mean(2)
    return torch.cat([small[:, :1], rest], 1)


def _as_video(latents: torch.Tensor, channels: int) -> torch.Tensor | None:
    """The first sample as (C, T, h, w); None if that is not what the latents are."""
    x = latents[0]
    if x.ndim == 3 and x.shape[0] == channels:
        return x[:, None]
    if x.ndim == 4 and x.shape[0] == channels:
        return x
    if x.ndim == 4 and x.shape[1] == channels:  # frames before channels
        return x.transpose(0, 1)
    return None
