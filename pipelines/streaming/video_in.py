"""A stream that changes a video: how far, its length, and what is done to the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tilewise.pipelines.conditioning.inputs import Inputs, cut_note, input_notes
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.input_video import video_facts
from tilewise.pipelines.options import is_number
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.errors import ConfigError

MOST_FRAMES = 10**6  # of a file
PURE = 0.99  # recipes that begin with noise alone begin above it
STRENGTH = 0.6  # noise level that a video is brought to, where nobody says


def check_edit(recipe: CausalRecipe | WindowRecipe, strength: float | None, *, with_image: bool) -> float:
    """The noise level that a video is brought to, which a stream changes.

    Raises ConfigError for one that cannot be, and a picture beside the video.
    """
    if with_image:
        raise ConfigError("stream: a video that is changed has its own first frame; leave the image out")
    if strength is None:
        own = 1.0 if isinstance(recipe, WindowRecipe) else recipe.sigmas()[0]
        return own if own < PURE else STRENGTH
    if not is_number(strength) or not 0 <= strength <= 1:
        raise ConfigError(f"stream: strength must be a noise level from 0 to 1, not {strength!r}")
    return float(strength)


def length_of_video(
    path: Path, options: StreamSettings, asked_fps: float | None, usual: float
) -> tuple[StreamSettings, float]:
    """The options of a stream that changes a video, and its frames a second: the file's, where nobody asks for others.

    usual: where the file does not say. The stream has as many frames as the video, or those of its first seconds.
    """
    facts = video_facts(path, MOST_FRAMES)
    fps = float(asked_fps or facts.fps or usual)
    frames = facts.frames if options.seconds is None else min(facts.frames, max(1, round(options.seconds * fps)))
    return dataclasses.replace(options, seconds=frames / fps), fps


def file_notes(pipe: Any, settings: GenerateSettings, usual: float) -> list[str]:
    """What is done to a stream's files, and what of them is not used. pipe: with or without weights. usual: the recipe's fps."""
    inputs, fps = Inputs.of(settings), settings.fps
    if "video" not in inputs.files:
        return input_notes(pipe, inputs)
    path = inputs.files["video"][0].path
    facts = video_facts(path, MOST_FRAMES)
    notes = [*facts.notes, *cut_note(path, facts.height, facts.width, inputs)]
    if facts.frames > settings.frames:
        notes.append(f"{path.name} has {facts.frames} frames: its first {settings.frames} are used")
    if abs(fps - usual) >= 0.01:
        notes.append(
            f"the video has {fps:g} frames a second, and the model was made for {usual:g}: every frame is kept, and motion is "
            "slower or faster than the model knows it"
        )
    return notes
