"""What a pipeline can stream, found without running it: a skeleton without weights will do."""

from __future__ import annotations

from typing import Any

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.latent_spaces.base import LatentSpace, latent_spaces
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.streaming.causal_denoiser import rotary_of
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policy

OWN_CACHE = "AnyFlow"  # diffusers' own causal Wan
LEAST_NOISE = 0.9  # that a chunk may begin at which begins as pure noise
RECIPE = "_tilewise_recipe"  # what load_causal_checkpoint leaves on a denoiser: the recipe's dict


def causal_recipe_of(pipe: Any) -> CausalRecipe | None:
    """The recipe of a pipeline's causal checkpoint; None: its weights are bidirectional for all that is known.

    Raises UnsupportedModelError for a model with a cache of its own.
    """
    if type(own := getattr(pipe, "transformer", None)).__name__.startswith(OWN_CACHE):
        raise UnsupportedModelError(
            f"stream: {type(own).__name__} has a cache of its own, with compressed frames, which tilewise does not stand in for. "
            "Its diffusers pipeline makes video chunk by chunk by itself"
        )
    kept = getattr(next(iter(denoisers_of(pipe).values())), RECIPE, None)
    return None if kept is None else CausalRecipe.from_dict(kept)


def cache_of(recipe: CausalRecipe, storage: str = "model") -> KVCache:
    """The KV cache that a recipe asks for. storage: see ``KVCache``."""
    return KVCache(
        recipe.window, recipe.sink, recipe.memory or None, sink_position=recipe.sink_position, policy=recipe.policy,
        storage=storage,
    )  # fmt: skip


def check_negative(recipe: CausalRecipe | WindowRecipe, negative: str | None) -> None:
    """Raises ConfigError for a negative prompt that would change nothing."""
    if negative and recipe.guidance <= 1:
        raise ConfigError(
            f"the recipe {recipe.name} has no guidance, so that a negative prompt would change nothing; leave it out"
        )


def check_stream(
    pipe: Any, recipe: CausalRecipe, cache: KVCache, *, chunk: int, height: int, width: int, edits: bool = False
) -> tuple[LatentSpace, Grid]:
    """Whether a pipeline can stream so: its latent space, and the token grid of a chunk.

    chunk: latent frames. height, width: pixels. edits: whether it changes a video, and does not begin with noise alone.

    Raises:
        UnsupportedModelError: a pipeline, denoiser or VAE that cannot stream.
        ConfigError: a size that the model does not take, a cache without room for the chunk, a recipe for two denoisers
            where there is one, or for video to video.
    """
    denoisers = list(denoisers_of(pipe).values())
    for denoiser in denoisers:
        rotary_of(denoiser)
    space = _space_of(pipe)
    first: Any = denoisers[0]
    family = family_of(first)
    assert family is not None
    whole = family.grid_of_size(first, pipe, Size(height, width, 1))
    cache.check_chunk(max(chunk, recipe.first_chunk or 0))
    policy(cache.policy).check(cache, chunk)
    if not edits and (begin := recipe.sigmas(True)[0]) < LEAST_NOISE:
        raise ConfigError(
            f"stream: the recipe {recipe.name} begins at the noise level {begin:g}: it is for video to video, and a stream "
            "begins with noise alone. Use a recipe whose timesteps begin at 1000, or give a video"
        )
    if recipe.boundary is not None and len(denoisers) < 2:
        raise ConfigError(f"stream: the recipe {recipe.name} has a boundary, and this pipeline one transformer")
    return space, Grid(chunk, whole.h, whole.w)


def _space_of(pipe: Any) -> LatentSpace:
    spaces, kind = latent_spaces(), type(pipe).__name__
    if kind not in spaces or not hasattr(pipe, "vae"):
        raise UnsupportedModelError(
            f"stream: {kind} cannot stream; load the checkpoint into a WanPipeline, which its transformer belongs to"
        )
    return spaces[kind]
