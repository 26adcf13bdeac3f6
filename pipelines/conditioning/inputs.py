"""A clip's files as arguments of a stock pipeline's call: decoded, and cut to the clip's shape."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tilewise.pipelines.conditioning.files import ONE, ROLES, SEVERAL, InputFile
from tilewise.pipelines.conditioning.roles import (
    CONDITIONS,
    MANY_IMAGES,
    covers_clip,
    of_own_size,
    roles_of,
    takes_strength,
)
from tilewise.pipelines.media.input_picture import first_frame_note, is_picture, picture_facts, read_picture
from tilewise.pipelines.media.input_video import read_video, video_facts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.native_size import call_parameters

MUCH = 0.02  # share of a side that may be cut off without a word


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a clip is made from beside its prompt. height, width: of the clip, pixels. strength: None for the pipeline's own."""

    files: Mapping[str, tuple[InputFile, ...]]
    height: int
    width: int
    frames: int
    strength: float | None = None

    @classmethod
    def of(cls, settings: Any) -> Inputs:
        """Those of `GenerateSettings`."""
        return cls(files_of(vars(settings)), settings.height, settings.width, settings.frames, settings.strength)

    def check(self) -> None:
        """Raises ConfigError for a file that is gone, or has changed since the settings were made."""
        for role, files in self.files.items():
            for file in files:
                file.resolved(role)


def files_of(given: Mapping[str, Any]) -> dict[str, tuple[InputFile, ...]]:
    """The files that settings name, by role; roles without one are left out. Raises ConfigError for what is no path."""
    told = {role: (given[role],) for role in ONE if given.get(role) is not None}
    told |= {role: tuple(given[role]) for role in SEVERAL if given.get(role)}
    return {role: tuple(InputFile.parse(role, said) for said in told[role]) for role in ROLES if role in told}


def input_arguments(pipe: Any, inputs: Inputs) -> dict[str, Any]:
    """Arguments of the pipeline's call. Raises as `Inputs.check`, and ConfigError for a file that is damaged."""
    inputs.check()
    parameters = call_parameters(pipe)
    arguments: dict[str, Any] = {}
    if CONDITIONS in parameters:
        if inputs.files:
            arguments[CONDITIONS] = _conditions(pipe, inputs)
        return arguments
    names = roles_of(pipe)
    for role in inputs.files:
        if role != "reference":
            arguments[names[role]] = _argument(pipe, inputs, role)
    if references := [read_picture(file.path) for file in inputs.files.get("reference", ())]:
        name = names["reference"]
        if type(pipe).__name__ in MANY_IMAGES:
            arguments[name] = [*([arguments[name]] if name in arguments else []), *references]
        else:
            arguments[name] = references[0] if name == "image_reference" else references
    if inputs.strength is not None and takes_strength(pipe):
        arguments["strength"] = inputs.strength
    if inputs.files and "max_area" in parameters:  # FLUX.1 Kontext: else it makes a megapixel, whatever is asked for
        arguments["max_area"] = inputs.height * inputs.width
    return arguments


def input_notes(pipe: Any, inputs: Inputs) -> list[str]:
    """What is done to the files on the way to the model, and what of them is not used."""
    notes: list[str] = []
    for role, files in inputs.files.items():
        for file in files:
            if role == "video" or not is_picture(file.path):
                notes += _video_notes(pipe, inputs, role, file.path)
                continue
            facts = picture_facts(file.path)
            animated = role == "mask" and facts.frames > 1 and "video" in inputs.files
            notes += [*facts.notes, *([] if animated else first_frame_note(file.path, facts))]
            if role != "reference" and not (role == "image" and of_own_size(pipe)):
                notes += cut_note(file.path, facts.height, facts.width, inputs)
    return list(dict.fromkeys(notes))


def first_picture(inputs: Inputs) -> Image.Image:
    """The picture that a clip begins with, at the clip's size. Raises as `input_arguments`."""
    inputs.check()
    return fitted(read_picture(inputs.files["image"][0].path), inputs.height, inputs.width)


def video_frames(inputs: Inputs) -> Iterator[NDArray[np.uint8]]:
    """The frames of the video that a clip is made from, uint8 (1, H, W, 3) each at the clip's size, as they are read. Raises as
    `input_arguments`."""
    inputs.check()
    for frame in itertools.islice(read_video(inputs.files["video"][0].path, inputs.frames), inputs.frames):
        yield np.asarray(fitted(frame, inputs.height, inputs.width))[None]


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture in another size: scaled until it covers that, with what stands out cut off on both sides alike."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def check_references(pipe: Any, files: Mapping[str, Sequence[InputFile]]) -> None:
    """Raises ConfigError for more references than a pipeline takes."""
    if len(files.get("reference", ())) > 1 and roles_of(pipe).get("reference") == "image_reference":
        raise ConfigError(f"{type(pipe).__name__} takes one --reference, not {len(files['reference'])}")


def _argument(pipe: Any, inputs: Inputs, role: str) -> Any:
    path = inputs.files[role][0].path
    if role == "video":
        return _frames(path, inputs)
    if role == "mask" and "video" in inputs.files:
        if is_picture(path) and picture_facts(path).frames == 1:
            return [fitted(read_picture(path), inputs.height, inputs.width)] * inputs.frames
        return _frames(path, inputs)
    picture = read_picture(path)
    return picture if role == "image" and of_own_size(pipe) else fitted(picture, inputs.height, inputs.width)


def _frames(path: Path, inputs: Inputs) -> list[Image.Image]:
    shown = itertools.islice(read_video(path, inputs.frames), inputs.frames)
    return [fitted(frame, inputs.height, inputs.width) for frame in shown]


def _conditions(pipe: Any, inputs: Inputs) -> list[Any]:
    """Pictures and videos with their places, in the classes of LTX's pipeline modules."""
    strength = 1.0 if inputs.strength is None else inputs.strength
    earlier = not type(pipe).__name__.startswith("LTX2")
    found: list[Any] = []
    for role in inputs.files:
        data = _argument(pipe, inputs, role)
        last = role == "last_image"
        if earlier:
            from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

            kind = {"video" if role == "video" else "image": data}
            place = inputs.frames - 1 if last else 0  # counted in frames
            found.append(LTXVideoCondition(**kind, frame_index=place, strength=strength))
        else:
            from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

            place = -1 if last else 0  # counted in latent frames
            found.append(LTX2VideoCondition(frames=data, index=place, strength=strength))
    return found


def _video_notes(pipe: Any, inputs: Inputs, role: str, path: Path) -> list[str]:
    facts = video_facts(path, inputs.frames + 1)
    notes = [*facts.notes, *cut_note(path, facts.height, facts.width, inputs)]
    if facts.frames > inputs.frames:
        notes.append(f"{path.name} is longer than the clip: its first {inputs.frames} frames are used")
    elif role == "video" and facts.frames < inputs.frames and not covers_clip(pipe):
        notes.append(f"{path.name} has {facts.frames} frames, which the clip goes on from")
    return notes


def cut_note(path: Path, height: int, width: int, inputs: Inputs) -> list[str]:
    """What of a file of this size, in pixels, is cut off."""
    scale = max(inputs.height / height, inputs.width / width)
    lost = {
        "top and bottom": 1 - inputs.height / (scale * height),
        "left and right": 1 - inputs.width / (scale * width),
    }
    return [
        f"{path.name} is {width}×{height} and the clip {inputs.width}×{inputs.height}: {share:.0%} of it is cut off at {where}"
        for where, share in lost.items()
        if share > MUCH
    ]
