"""Against drift of colour and contrast: the statistics of latents, matched to those of the first window.

z'_c = (z_c − μ_c) / s_c · s⁰_c + μ⁰_c        AdaIN (arXiv 1703.06868, eq. 8), by latent channel c
"""

from __future__ import annotations

import torch

LEAST = 1e-6


def statistics(latents: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of each channel of (1, C, t, h, w): (2, C) float32."""
    flat = latents.float().transpose(0, 1).flatten(1)
    return torch.stack([flat.mean(1), flat.std(1, correction=0)])


def matched(latents: torch.Tensor, wanted: torch.Tensor, share: float) -> torch.Tensor:
    """Latents (1, C, t, h, w) with ``statistics`` a share of the way from their own to the wanted ones, (2, C)."""
    (mean, deviation), (mean_0, deviation_0) = (
        both.view(2, 1, -1, 1, 1, 1).to(latents) for both in (statistics(latents), wanted)
    )
    moved = (latents - mean) / deviation.clamp(min=LEAST) * deviation_0 + mean_0
    return torch.lerp(latents, moved, share)
