"""Which recipe a stream goes by: a causal checkpoint's, or windows where there is none."""

from __future__ import annotations

from typing import Any

from tilewise.pipelines.streaming.checks import causal_recipe_of
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.windows.plan import window_recipe
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.streaming.kv_cache import KVCache

OPTIONS = ("way", "window", "overlap", "steps", "guidance", "adain", "prefix_noise", "sink", "previous")  # of windows


def choose_recipe(
    pipe: Any,
    given: CausalRecipe | WindowRecipe | None,
    *,
    cache: KVCache | None = None,
    chunk: int | None = None,
    **windows: Any,
) -> CausalRecipe | WindowRecipe:
    """The recipe that is given, that of the pipeline's causal checkpoint, or one of windows.

    cache, chunk: of a causal checkpoint. windows: arguments of ``window_recipe``, None where nobody gave them.

    Raises:
        ConfigError: options of windows for a causal checkpoint, or the other way round; as ``window_recipe``.
        UnsupportedModelError: a pipeline that can stream neither way.
    """
    for name in windows:
        if name not in OPTIONS:
            raise unknown("option of a stream", name, OPTIONS)
    said = {name: value for name, value in windows.items() if value is not None}
    own = causal_recipe_of(pipe)
    if isinstance(given, WindowRecipe):
        recipe: CausalRecipe | WindowRecipe = given.replace(**said)
    elif given is not None:
        recipe = given
    elif own is not None and "way" not in said:
        recipe = own
    else:
        recipe = window_recipe(pipe, **said)
    if isinstance(recipe, CausalRecipe) and said:
        name = next(iter(said))
        instead = {
            "window": "give cache=KVCache(window=…)",
            "sink": "give cache=KVCache(window=…, sink=…)",
            "guidance": "give a recipe with it",
            "steps": "its passes are the recipe's timesteps",
        }
        raise ConfigError(
            f"stream: {name} is of windows, and this pipeline has a causal checkpoint (recipe {recipe.name}): "
            f"{instead.get(name, 'leave it out')}, or name a way to make windows of it"
        )
    if isinstance(recipe, WindowRecipe) and (cache is not None or chunk is not None):
        name = "cache" if cache is not None else "chunk"
        raise ConfigError(
            f"stream: {name} is of causal checkpoints, and this stream makes windows ({recipe.way}): give window and overlap "
            "instead. Where the weights are causal, load them with tilewise.load_causal_checkpoint, or give a recipe"
        )
    return recipe
