"""Chroma: Flux.1's latents; guidance is a second forward."""

from __future__ import annotations

from tilewise.pipelines.latent_spaces.flux import FluxLatents


class ChromaLatents(FluxLatents):
    pipelines = ("ChromaPipeline",)
    distilled = False


SPACE = ChromaLatents()
