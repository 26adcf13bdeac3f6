"""What a bidirectional pipeline can do window by window, found without running it: a skeleton without weights will do."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.streaming.windows.noise import untold_noise
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.pipelines.streaming.windows.refused import WHY
from tilewise.pipelines.streaming.windows.spaces import window_spaces
from tilewise.pipelines.streaming.windows.ways.base import Way, needs_picture, way_named, ways
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

# How the notes of `window_notes` begin.
UNTRAINED = (
    "(an overlap of .* is longer than|nothing says that these weights|the way .* is experimental|this .* makes )"
)


def window_space(pipe: Any) -> LatentSpace:
    """The latent space of a pipeline whose windows can be chained.

    Raises UnsupportedModelError for a kind of pipeline that goes none of the ways.
    """
    spaces, kind = window_spaces(), type(pipe).__name__
    if kind in WHY:
        raise UnsupportedModelError(f"stream: {kind} goes none of the ways ({', '.join(ways())}): {WHY[kind]}")
    if kind not in spaces:
        raise UnsupportedModelError(
            f"stream: {kind} goes none of the ways ({', '.join(ways())}): each needs latents that can be read and given in "
            f"between, which is known of {', '.join(sorted(spaces))}. If its transformer fits one of these, make one of its parts"
        )
    if (why := spaces[kind].refuses(pipe)) is not None:
        raise UnsupportedModelError(f"stream: this {kind} goes none of the ways ({', '.join(ways())}): {why}")
    if (why := untold_noise(pipe.scheduler)) is not None:
        raise UnsupportedModelError(
            f"stream: {type(pipe.scheduler).__name__} {why}; give the pipeline another scheduler"
        )
    return spaces[kind]


def choose_way(pipe: Any, named: str | None) -> Way:
    """The way that is named, or the first usual one of a pipeline.

    Raises ConfigError for a name that there is not, UnsupportedModelError with the reason where a pipeline cannot go it.
    """
    if named is not None:
        way = way_named(named)
        if (why := way.refuses(pipe)) is not None:
            raise UnsupportedModelError(f"stream: {type(pipe).__name__} cannot go the way {named}: {why}")
        return way
    refused = {way.name: way.refuses(pipe) for way in ways().values()}
    for way in ways().values():
        if refused[way.name] is None and way.usual(pipe):
            return way
    raise UnsupportedModelError(
        f"stream: {type(pipe).__name__} goes none of the ways: "
        + "; ".join(f"{n}: {w}" for n, w in refused.items() if w)
    )


def window_recipe(
    pipe: Any,
    *,
    way: str | None = None,
    window: int | None = None,
    overlap: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    adain: float = 0.0,
    prefix_noise: float = 0.0,
    sink: int = 0,
    previous: int = 0,
) -> WindowRecipe:
    """How a bidirectional pipeline streams; what is None is the model's own, or the way's.

    Raises:
        ConfigError: values that contradict each other.
        UnsupportedModelError: a pipeline that goes none of the ways, or not the one that is named.
    """
    space = window_space(pipe)
    chosen = choose_way(pipe, way)
    own = model_defaults(pipe)
    temporal = space.factors(pipe)[1]
    window = (own.frames - 1) // temporal + 1 if window is None else window
    if overlap is None and isinstance(window, int) and window > 1:
        overlap = chosen.usual_overlap(pipe, window)
    overlap = 1 if overlap is None else overlap
    if steps is None:
        whole = isinstance(window, int) and isinstance(overlap, int) and overlap < window
        steps = chosen.usual_steps(own.steps, window - overlap) if whole else own.steps
    return WindowRecipe(
        way=chosen.name,
        window=window,
        overlap=overlap,
        steps=steps,
        guidance=own.guidance if guidance is None else guidance,
        fps=own.fps if fps is None else fps,
        height=own.height if height is None else height,
        width=own.width if width is None else width,
        adain=adain,
        prefix_noise=prefix_noise,
        sink=sink,
        previous=previous,
    )


def check_windows(pipe: Any, recipe: WindowRecipe, settings: GenerateSettings) -> LatentSpace:
    """Whether a pipeline can stream by a recipe. settings: of a window, see ``window_settings``.

    Raises ConfigError for a size that the model does not take or options that the way does not have, UnsupportedModelError as
    ``window_recipe`` does.
    """
    space = window_space(pipe)
    way = choose_way(pipe, recipe.way)
    if recipe.overlap == 0:
        raise ConfigError(
            "windows: with an overlap of 0 latent frames no window goes on from the one before; give at least 1"
        )
    if (most := way.most(pipe)) is not None and recipe.overlap > most:
        raise ConfigError(
            f"windows: by the way {way.name} a window of a {type(pipe).__name__} goes on from one frame: overlap must be {most}, "
            f"not {recipe.overlap}"
        )
    if (why := way.refuses_steps(recipe.steps, recipe.chunk)) is not None:
        raise ConfigError(f"windows: by the way {way.name} {why}")
    if (recipe.sink or recipe.previous) and not any(
        layer.downsample is None
        for one in denoisers_of(pipe).values()
        for layer in family_of(one).layers(one)  # type: ignore[union-attr]
    ):
        raise ConfigError(
            f"windows: a {type(pipe).__name__} attends within each frame, without keys of others; leave sink and previous out"
        )
    if way.queued and (recipe.sink or recipe.previous):
        raise ConfigError(
            f"windows: sink and previous keep keys of each pass of a window, and by the way {way.name} its frames are at many"
        )
    if recipe.prefix_noise and not way.per_frame:
        raise ConfigError(f"windows: prefix_noise is of the way prefix, and this stream goes the way {way.name}")
    for denoiser in denoisers_of(pipe).values():
        if (family := family_of(denoiser)) is not None:
            family.grid_of_size(denoiser, pipe, Size(settings.height, settings.width, settings.frames))
    picture = np.zeros((1, 1, 1, 3), np.uint8)
    call_arguments(pipe, settings, tuple(way.arguments(pipe, picture, 1)) if way.restarts else ())
    return space


def check_start(pipe: Any, recipe: WindowRecipe, with_image: bool, with_video: bool) -> None:
    """Raises ConfigError for a picture to begin with where the way has no place for it, or none where it needs one and there is
    no video either."""
    way = way_named(recipe.way)
    if way.restarts and not with_image and not with_video and needs_picture(pipe) is not None:
        raise ConfigError(f"windows: the way {recipe.way} begins with a picture: give an image")
    if with_video and way.queued:
        raise ConfigError(
            f"windows: the way {recipe.way} begins its frames as noise, and changes no video; give another way"
        )
    if with_image and not (way.per_frame or way.restarts):
        raise ConfigError(f"windows: the way {recipe.way} begins with noise alone; leave the image out")


def window_notes(pipe: Any, recipe: WindowRecipe) -> list[str]:
    """What a recipe asks of a model that its training says nothing of."""
    way = way_named(recipe.way)
    trained = way.trained(pipe)
    notes = [f"the way {way.name} is experimental: it {way.experimental}"] if way.experimental else []
    if left_out := window_space(pipe).left_out:
        notes.append(f"this {type(pipe).__name__} makes {left_out}")
    if trained is None or recipe.overlap <= trained:
        return notes
    model = type(next(iter(denoisers_of(pipe).values()))).__name__
    if trained == 0:
        return [
            *notes,
            f"nothing says that these weights of {model} were trained with clean frames in front of noisy ones, which the way "
            f"{recipe.way} gives it ({recipe.overlap} latent frames): what it draws after them may be noise",
        ]
    return [
        *notes,
        f"an overlap of {recipe.overlap} latent frames is longer than the {trained} that {model} was trained to go on from",
    ]


def warn(pipe: Any, recipe: WindowRecipe) -> None:
    """``window_notes`` as UserWarnings."""
    for note in window_notes(pipe, recipe):
        warnings.warn(note, stacklevel=4)


def window_settings(pipe: Any, space: LatentSpace, recipe: WindowRecipe, **given: Any) -> GenerateSettings:
    """The settings of a clip that is a window. given: more fields, as prompt, seed and method."""
    frames = 1 + (recipe.window - 1) * space.factors(pipe)[1]
    return GenerateSettings(
        height=recipe.height, width=recipe.width, frames=frames, steps=recipe.steps, guidance=recipe.guidance,
        fps=recipe.fps, **given,
    )  # fmt: skip
