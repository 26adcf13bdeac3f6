"""Flux.2: images. What is normalised are patches of 2×2 latents, each of whose numbers has a mean and std of its own: those of
the VAE's batch norm. The call takes patches as a picture and gives them as tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewise.pipelines.latent_spaces.base import LatentSpace, Statistics
from tilewise.plugins.diffusers_compat import flux2_mu


class Flux2Latents(LatentSpace):
    pipelines = ("Flux2Pipeline",)
    still = flat = distilled = True

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        norm = vae.bn
        std = torch.sqrt(norm.running_var + vae.config.batch_norm_eps)
        return _over(norm.running_mean, like), _over(std, like)

    def mu(self, config: Any, tokens: int, asked: dict[str, Any]) -> float:
        sigmas = asked.get("sigmas")
        return flux2_mu(tokens, asked["num_inference_steps"] if sigmas is None else len(sigmas))

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(latents[:, :, 0], 2)

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        _, h, w = shape
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2)[:, :, None]


def _over(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number for each of a patch's, (4 C,), at every place of latents (1, C, 1, h, w)."""
    patch = F.pixel_shuffle(numbers.view(1, -1, 1, 1), 2)
    h, w = like.shape[-2:]
    return patch.repeat(1, 1, h // 2, w // 2)[:, :, None].to(like)


SPACE = Flux2Latents()
