"""The recipes of the published causal checkpoints, and which file is which.

Sources: the inference configs that each project publishes with its weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewise.pipelines.loading.model_folder import read_json
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.plugins.errors import ConfigError, unknown

SELF_FORCING = CausalRecipe()
FOUR = SELF_FORCING.timesteps
CAUSAL_FORCING = CausalRecipe("causal-forcing")
FRAME_WISE = CAUSAL_FORCING.replace(name="causal-forcing-framewise", chunk=1)
CAUSVID = CausalRecipe("causvid", timesteps=(1000, 757, 522, 0), warp=False, shift=8)

_RECIPES = (
    SELF_FORCING,
    # 448 pixels high; the first transformer takes the passes down to a noise level of .875.
    SELF_FORCING.replace(
        name="self-forcing-a14b",
        timesteps=(1000, 850, 700, 550, 350, 275, 200, 125),
        shift=12,
        boundary=0.875,
        height=448,
    ),
    # Distilled for passes over several chunks at once, at rising noise levels. Here they run chunk by chunk.
    CausalRecipe("rolling-forcing", timesteps=(1000, 800, 600, 400, 200), window=24, sink=3),
    CausalRecipe("reward-forcing", window=9, sink=3, policy="ema"),
    CausalRecipe("longlive", window=12, sink=3, sink_position="absolute"),
    # UniPC's first noise level is .999 before the shift, and its steps divide that evenly.
    CausalRecipe(
        "longlive-2",
        chunk=8,
        timesteps=(999, 749.25, 499.5, 249.75),
        window=32,
        sink=8,
        policy="shot",
        solver="unipc",
        fps=24,
        height=704,
        width=1280,
    ),
    CAUSAL_FORCING,
    FRAME_WISE,
    # Those of one and two passes make their first chunk with all four.
    FRAME_WISE.replace(name="causal-forcing-2step", timesteps=(1000, 500), first_timesteps=FOUR),
    FRAME_WISE.replace(name="causal-forcing-1step", timesteps=(1000,), first_timesteps=FOUR),
    CausalRecipe("causal-forcing-long", window=24, sink=3),
    CAUSVID,
    CAUSVID.replace(name="causvid-4step", timesteps=FOUR, warp=True),
    # Video to video: the first pass starts from the input at a noise level of .7.
    CausalRecipe(
        "streamdiffusion-v2",
        chunk=1,
        timesteps=(700, 500, 400, 200, 0),
        warp=False,
        shift=8,
        window=6,
        sink=3,
        policy="adaptive",
    ),
    CausalRecipe("krea", timesteps=(1000, 937, 833, 625, 0), warp=False, window=6),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}


@dataclass(frozen=True)
class Known:
    """A published checkpoint: ``words`` in the name of its file or of a folder above, ``also`` anywhere in the path.

    averaged: whether its authors sample with the averaged weights (generator_ema) where a file has both.
    denoisers: how many it has. latents: channels, where they tell two models of one name apart.
    """

    recipe: str
    words: str
    also: str = ""
    averaged: bool = False
    denoisers: int = 1
    latents: int | None = None


_FRAME_OR_CHUNK = r"causal-?forcing|framewise|chunkwise"
# The first row that fits is taken, so special ones come first.
_KNOWN = (
    Known("longlive-2", r"longlive", also=r"longlive-?v?2"),
    Known("longlive-2", r"longlive", latents=48),
    Known("longlive", r"longlive"),
    Known("rolling-forcing", r"rolling-?forcing", averaged=True),
    Known("reward-forcing", r"reward-?forcing"),
    Known("causal-forcing-long", _FRAME_OR_CHUNK, also=r"long-?video", averaged=True),
    Known("causal-forcing-1step", _FRAME_OR_CHUNK, also=r"1-?step", averaged=True),
    Known("causal-forcing-2step", _FRAME_OR_CHUNK, also=r"2-?step", averaged=True),
    Known("causal-forcing-framewise", _FRAME_OR_CHUNK, also=r"framewise", averaged=True),
    Known("causal-forcing", _FRAME_OR_CHUNK),
    Known("causvid-4step", r"causvid|autoregressive-checkpoint", also=r"warp-4-?step"),
    Known("causvid", r"causvid|autoregressive-checkpoint"),
    Known("streamdiffusion-v2", r"stream-?diffusion-?v2|wan-causal-dmd-v2v"),
    Known("krea", r"krea"),
    Known("self-forcing-a14b", r"sf-?wan|causal-?wan|self-?forcing", denoisers=2),
    Known("self-forcing", r"sf-?wan|self-?forcing", averaged=True),
)


def recognise(path: Path, denoisers: int = 1, latents: int | None = None) -> Known | None:
    """The published checkpoint that a path names: its last part counts most, then up to three folders above it."""
    parts = [re.sub(r"[_\s]+", "-", part.lower()) for part in path.absolute().parts[-4:]]
    whole = "/".join(parts)
    for part in reversed(parts):
        for known in _KNOWN:
            fits = known.denoisers == denoisers and known.latents in (None, latents)
            if fits and re.search(known.words, part) and re.search(known.also, whole):
                return known
    return None


def beside(path: Path) -> CausalRecipe | None:
    """The recipe in a JSON file beside a checkpoint (<file>.recipe.json) or in its folder (recipe.json).

    Raises ModelError for a file that is not JSON, ConfigError, naming it, for one that is no recipe.
    """
    folder = path if path.is_dir() else path.parent
    for file in (path.with_name(f"{path.name}.recipe.json"), folder / "recipe.json"):
        if file.is_file():
            try:
                return CausalRecipe.from_dict({"name": path.stem, **read_json(file)})
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    return None


def choose_recipe(
    path: Path,
    given: str | CausalRecipe | Mapping[str, Any] | None,
    changes: Mapping[str, Any],
    known: Known | None,
) -> CausalRecipe:
    """The recipe that is given, or else the one beside the file, or else that of the name; with ``changes``.

    Raises ConfigError if there is none, or for unknown names and fields.
    """
    if isinstance(given, CausalRecipe):
        recipe: CausalRecipe | None = given
    elif isinstance(given, Mapping):
        recipe = CausalRecipe.from_dict(given)
    elif given is not None:
        if given not in RECIPES:
            raise unknown("causal recipe", given, RECIPES)
        recipe = RECIPES[given]
    else:
        recipe = beside(path) or (RECIPES[known.recipe] if known else None)
    if recipe is None:
        raise ConfigError(
            f"{path} is no causal checkpoint that is known by its name. If it is one, give recipe= with the name of a recipe "
            f"({', '.join(RECIPES)}) or a CausalRecipe, or put a recipe.json beside it. The weights of an ordinary Wan "
            "model attend to all frames at once and make no video chunk by chunk"
        )
    return recipe.replace(**changes)
