"""Stable Diffusion 3 and 3.5: images, latents as the VAE makes them."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.base import LatentSpace


class SD3Latents(LatentSpace):
    pipelines = ("StableDiffusion3Pipeline",)
    one_batch = still = flat = True


SPACE = SD3Latents()
