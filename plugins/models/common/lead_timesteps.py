"""Timesteps of the first latent frames of a forward, for models that take one timestep per token or per latent frame."""

from __future__ import annotations

import torch


def lead_by_token(timestep: torch.Tensor, lead: torch.Tensor, area: int, frames: int) -> torch.Tensor:
    """One timestep for each of a clip's tokens in raster order (t slowest), float32.

    Args:
        timestep: the forward's own, (B,) or (B, tokens).
        lead: (k,) of the first k latent frames. area: tokens of a latent frame. frames: latent frames, at least k.

    Returns:
        (B, frames · area).
    """
    own = timestep.float()
    whole = own[:, None].expand(-1, frames * area) if own.ndim == 1 else own
    mine = lead.to(own).repeat_interleave(area).expand(len(own), -1)
    return torch.cat([mine, whole[:, mine.shape[1] :]], 1)
