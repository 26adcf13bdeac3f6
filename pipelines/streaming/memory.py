"""The memory of a stream: the plans of its caches, and whether all of it fits on the device."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.memory.stream_plan import StreamMemory, plan_stream
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.windows.earlier import earlier_bytes
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.explain import expected_device
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.streaming.cache_plan import CachePlan, plan_cache
from tilewise.plugins.streaming.causal_denoiser import rotary_of
from tilewise.plugins.streaming.kv_cache import KVCache
from tilewise.plugins.streaming.policies.base import policy


def denoisers_used(pipe: Any, recipe: CausalRecipe) -> dict[str, Any]:
    """The denoisers that a recipe runs, by name: the first one, or with a boundary both."""
    return dict(list(denoisers_of(pipe).items())[: 1 if recipe.boundary is None else 2])


def lanes_of(recipe: CausalRecipe) -> int:
    """Forwards of a pass that each have keys of their own."""
    return 2 if recipe.guidance > 1 else 1


def cache_plans(pipe: Any, recipe: CausalRecipe, cache: KVCache, grid: Grid) -> dict[str, CachePlan]:
    """The sizes of a stream's caches by denoiser. grid: of a chunk."""
    rule = policy(cache.policy)
    found = {}
    for name, denoiser in denoisers_used(pipe, recipe).items():
        family = family_of(denoiser)
        assert family is not None
        found[name] = plan_cache(
            family.layers(denoiser), rotary_of(denoiser), cache, grid, memory=rule.memory(grid.t, cache.sink),
            averages=rule.averages, lanes=lanes_of(recipe), batch=1, dtype=denoiser.dtype,
        )  # fmt: skip
    return found


def memory_of(
    pipe: Any,
    space: LatentSpace,
    recipe: CausalRecipe,
    cache: KVCache,
    grid: Grid,
    size: tuple[int, int],
    *,
    device: str | torch.device | None = None,
    decode_device: str | torch.device | None = None,
    own_vae: bool = True,
    exact: bool = True,
) -> StreamMemory:
    """What a stream takes.

    Args:
        pipe: loaded, or a skeleton, whose weights are counted. The others: as they were checked by ``check_stream``.
        size: height and width in pixels.
        device: of a skeleton: where it would be loaded. Default: where the pipeline is, or a GPU if there is one.
        own_vae, exact: see ``plan_stream``.
    """
    plans = cache_plans(pipe, recipe, cache, grid)
    longest = max(grid.t, recipe.first_chunk or 0)
    if device is None:
        first = next(iter(denoisers_used(pipe, recipe).values()))
        device = expected_device(first) if first.device.type == "meta" else execution_device(pipe, pipe.device)
    events = policy(cache.policy).events
    more = ['storage "fp8", which halves the cache'] if cache.storage == "model" else []
    more += ["no guidance, which has a cache of its own"] if lanes_of(recipe) == 2 else []
    more += ["a decode_device of its own"] if own_vae and torch.device(device).type == "cuda" else []
    return plan_stream(
        pipe,
        space,
        cache=sum(plan.total for plan in plans.values()),
        latent=sum(plan.latent for plan in plans.values()),
        between=max(plan.between_chunks(longest, events) for plan in plans.values()),
        tokens=longest * grid.h * grid.w,
        chunk=longest,
        window=cache.window,
        sink=cache.sink,
        size=size,
        device=torch.device(device),
        decode_device=None if decode_device is None else torch.device(decode_device),
        own_vae=own_vae,
        more=tuple(more),
        exact=exact,
    )


def window_memory(
    pipe: Any,
    space: LatentSpace,
    settings: GenerateSettings,
    recipe: WindowRecipe,
    *,
    device: str | torch.device | None = None,
    decode_device: str | torch.device | None = None,
    own_vae: bool = True,
) -> StreamMemory:
    """What a stream of windows takes: a forward over a whole window, and keys of earlier ones; arguments as for ``memory_of``.

    settings: of a clip that is a window.
    """
    first: Any = next(iter(denoisers_of(pipe).values()))
    family = family_of(first)
    assert family is not None
    grid = family.grid_of_size(first, pipe, Size(settings.height, settings.width, settings.frames))
    if device is None:
        device = expected_device(first) if first.device.type == "meta" else execution_device(pipe, pipe.device)
    latents = space.shape(pipe, settings.height, settings.width, settings.frames)[0]
    tokens = grid.video * (latents if grid.t == 1 else 1)  # a UNet's grid is of one picture
    earlier = earlier_bytes(pipe, recipe, grid)
    more = ("a smaller sink, or previous, whose keys are kept for each step",) if earlier else ()
    return plan_stream(
        pipe, space, cache=earlier, latent=0, between=0, tokens=tokens, chunk=latents, window=latents, sink=0,
        size=(settings.height, settings.width), device=torch.device(device),
        decode_device=None if decode_device is None else torch.device(decode_device), own_vae=own_vae, more=more, exact=False,
    )  # fmt: skip
