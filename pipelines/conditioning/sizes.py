"""Size, length and frame rate of a clip that is made from a picture or a video: those of the file, as the model takes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tilewise.pipelines.conditioning.files import InputFile, flag
from tilewise.pipelines.conditioning.roles import MANY_IMAGES, covers_clip
from tilewise.pipelines.media.input_picture import is_picture, picture_facts
from tilewise.pipelines.media.input_video import video_facts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.native_size import VIDEO_FRAMES, call_parameters
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.text_format import counted

STEPS = (8, 16, 32, 64, 128)  # pixels that a model's sides may be multiples of
MOST_ASPECT = 4.0  # times as long as high, or the other way round


class ClipSize(NamedTuple):
    """height, width: pixels. fps: frames a second; None: as usual."""

    height: int
    width: int
    frames: int
    fps: float | None


def size_of_clip(
    pipe: Any,
    files: Mapping[str, tuple[InputFile, ...]],
    native: Size,
    *,
    height: int | None,
    width: int | None,
    frames: int | None,
) -> ClipSize:
    """The size of a clip from what is given of it, its files, and the model's default area and length.

    The shape is that of the picture, or else of the video, the last picture, or the first of many pictures. A video that goes
    over the whole clip gives its length and its frame rate too.

    Raises ConfigError for files that cannot be used in their roles, and for more frames than a video has.
    """
    check_kinds(files)
    length, fps = _length(pipe, files, native, frames)
    shape = _shape(pipe, files)
    usual = (native.height if height is None else height, native.width if width is None else width)
    if shape is not None and "height" not in call_parameters(pipe) and hasattr(pipe, "target_size"):
        return ClipSize(*_size_of_its_own(pipe, shape, height, width), length, fps)
    if shape is None or (height is not None and width is not None) or min(usual) < 1:
        return ClipSize(*usual, length, fps)
    aspect = min(max(shape[1] / shape[0], 1 / MOST_ASPECT), MOST_ASPECT)
    if height is not None:
        wanted = (float(height), height * aspect)
    elif width is not None:
        wanted = (width / aspect, float(width))
    else:
        wanted = (math.sqrt(native.height * native.width / aspect), math.sqrt(native.height * native.width * aspect))
    possible: list[tuple[int, int]] = []
    for step in STEPS:
        sides = [
            [given] if given is not None else [max(step, step * (int(side / step) + more)) for more in (0, 1)]
            for side, given in zip(wanted, (height, width), strict=True)
        ]
        around = [(h, w) for h, w in itertools.product(*sides)]
        taken = [size for size in around if _taken(pipe, Size(*size, length))]
        possible += taken
        if len(taken) == len(around):  # the model's own step: those of half of it would be chosen by chance
            break
    if possible:
        return ClipSize(*min(possible, key=lambda size: _distance(size, wanted)), length, fps)
    return ClipSize(*usual, length, fps)


def _distance(size: tuple[int, ...], wanted: tuple[float, float]) -> float:
    """How far a size is from another one, in shape and, by half as much, in area."""
    h, w = (math.log(side / other) for side, other in zip(size, wanted, strict=True))
    return abs(h - w) + abs(h + w) / 2


def _size_of_its_own(pipe: Any, shape: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """Of HunyuanVideo 1.5, which sizes the clip by its picture, whatever is asked for."""
    own = tuple(int(n) for n in pipe.video_processor.calculate_default_height_width(*shape, pipe.target_size))
    if height not in (None, own[0]) or width not in (None, own[1]):
        raise ConfigError(
            f"{type(pipe).__name__} makes {own[1]}×{own[0]} pixels of a picture of this shape, and no other size: leave --height "
            "and --width out"
        )
    return own[0], own[1]


def check_kinds(files: Mapping[str, tuple[InputFile, ...]]) -> None:
    """Raises ConfigError for files that cannot be used in their roles: a video as a picture, a damaged one, and the like."""
    for role, named in files.items():
        for file in named:
            if role == "video":
                if is_picture(file.path) and picture_facts(file.path).frames == 1:
                    raise ConfigError(
                        f"--video: {file.path} is one picture and no video; a picture is given by --image"
                    )
            elif role != "mask" and not is_picture(file.path):
                raise ConfigError(
                    f"{flag(role)}: {file.path} is no picture in a format that is read here; a video is given by --video"
                )
            if role != "video" and is_picture(file.path):
                picture_facts(file.path)
    if (mask := files.get("mask")) and not is_picture(mask[0].path) and "video" not in files:
        raise ConfigError(f"--mask: {mask[0].path} is no picture, and there is no --video that its frames are for")


def _shape(pipe: Any, files: Mapping[str, tuple[InputFile, ...]]) -> tuple[int, int] | None:
    """(height, width) of the file that gives a clip its shape."""
    if "image" not in files and "video" in files:
        video = video_facts(files["video"][0].path, 1)
        return video.height, video.width
    roles = ("image", "last_image", *(["reference"] if type(pipe).__name__ in MANY_IMAGES else []))
    for role in roles:
        if role in files:
            picture = picture_facts(files[role][0].path)
            return picture.height, picture.width
    return None


def _length(
    pipe: Any, files: Mapping[str, tuple[InputFile, ...]], native: Size, frames: int | None
) -> tuple[int, float | None]:
    """Frames of the clip, and its rate if a video gives it."""
    if "video" not in files or not covers_clip(pipe):
        return native.frames if frames is None else frames, None
    path = files["video"][0].path
    usual = native.frames if native.frames > 1 else VIDEO_FRAMES
    video = video_facts(path, max(1, usual if frames is None else frames))
    if frames is not None and frames > video.frames:
        raise ConfigError(
            f"{path} has {counted(video.frames, 'frame')}, and the clip is to have {frames}: give fewer --frames"
        )
    length = frames
    if length is None:
        length = next(
            (n for n in range(video.frames, 0, -1) if _taken(pipe, Size(native.height, native.width, n))), video.frames
        )
    if (mask := files.get("mask")) and not _still(mask[0]):
        masks = video_facts(mask[0].path, length)
        if masks.frames < length:
            raise ConfigError(
                f"--mask: {mask[0].path} has {counted(masks.frames, 'frame')}, and the clip {length}; give one a frame, or a "
                "picture that holds for all"
            )
    return length, video.fps


def _still(file: InputFile) -> bool:
    return is_picture(file.path) and picture_facts(file.path).frames == 1


def _taken(pipe: Any, size: Size) -> bool:
    """Whether the denoisers of a pipeline take a size; those that no family serves are not asked."""
    for denoiser in denoisers_of(pipe).values():
        family = family_of(denoiser)
        try:
            if family is not None:
                family.grid_of_size(denoiser, pipe, size)
        except ConfigError:
            return False
    return True
