"""Z-Image: images, latents as the VAE makes them."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.base import LatentSpace


class ZImageLatents(LatentSpace):
    pipelines = ("ZImagePipeline",)
    one_batch = still = flat = True


SPACE = ZImageLatents()
