"""Keys of earlier windows that later ones attend to, ``sink`` and ``previous`` of a recipe: on a pipeline, and their memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.generation.stock_call import guidance_is_an_input
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of, patches_of
from tilewise.plugins.runtime.earlier_keys import EarlierKeys


def check_earlier(recipe: WindowRecipe, config: Config) -> None:
    """Raises ConfigError where a patch leaves calls out whose keys later windows would attend to."""
    if config.step_cache is not None and (recipe.sink or recipe.previous):
        raise ConfigError(
            "windows: a step cache leaves out layers whose keys of earlier windows sink and previous attend to; leave the cache "
            "out, or both of them"
        )


@contextlib.contextmanager
def earlier_keys(pipe: Any, recipe: WindowRecipe) -> Iterator[list[EarlierKeys]]:
    """Run a block in which each denoiser of a patched pipeline keeps what a recipe names; one for each, none where it names
    nothing. Raises as ``check_earlier``."""
    kept: list[EarlierKeys] = []
    with contextlib.ExitStack() as undo:
        if recipe.sink or recipe.previous:
            for patch in patches_of(pipe).values():
                check_earlier(recipe, patch.config)
                patch.state.earlier = EarlierKeys(recipe.sink, recipe.previous, recipe.overlap)
                undo.callback(setattr, patch.state, "earlier", None)
                kept.append(patch.state.earlier)
        yield kept


def earlier_bytes(pipe: Any, recipe: WindowRecipe, grid: Grid) -> int:
    """Bytes of what is kept: keys and values of each layer and pass. grid: of a window.

    Guidance is counted as a second forward of each pass, or sample of its batch, where the denoiser has it as no input.
    """
    frames = recipe.sink + recipe.previous
    first: Any = next(iter(denoisers_of(pipe).values()))
    family = family_of(first)
    assert family is not None
    lanes = 2 if recipe.guidance > 1 and not guidance_is_an_input(pipe) else 1
    width = sum(layer.heads * layer.head_dim for layer in family.layers(first) if layer.downsample is None)
    return 2 * frames * grid.h * grid.w * width * recipe.steps * lanes * first.dtype.itemsize
