"""Read pictures that a clip is made from: any mode and orientation, as RGB; what was done to them is told."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no others: some readers run programs
LEAST_SIDE, MOST_SIDE = 16, 8192  # pixels
ORIENTATION = 0x0112  # the tag of EXIF; 5 to 8 are turned by a quarter
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class PictureFacts:
    """Of a picture file. height, width: pixels, the right way up. frames: of an animation, else 1. fps: of an animation that says
    so, else None. notes: what is done to its pixels, for users."""

    height: int
    width: int
    frames: int
    fps: float | None
    notes: tuple[str, ...]


def is_picture(path: Path) -> bool:
    """Whether a file's content begins as a picture does, or an animation in a format of pictures (GIF, WebP). Raises ConfigError
    for a file that cannot be opened."""
    try:
        with _opened(path):
            return True
    except Image.UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True


def picture_format(path: Path) -> str:
    """Which of FORMATS a picture's content is. Raises as `picture_facts`."""
    with _picture(path) as image:
        return str(image.format)


def picture_facts(path: Path) -> PictureFacts:
    """Size and kind of a picture, whose first frame is decoded: what is found damaged is found before long work.

    Raises ConfigError for what is no picture, is damaged, or has sides out of LEAST_SIDE … MOST_SIDE; the size is checked before
    pixels are read.
    """
    facts = path.stat()
    return _facts(path, facts.st_mtime_ns, facts.st_size)


def read_picture(path: Path) -> Image.Image:
    """The picture, or the first frame of an animation, in RGB. Raises as `picture_facts`."""
    return next(read_animation(path))


def read_animation(path: Path) -> Iterator[Image.Image]:
    """The frames of an animation in RGB, or the picture alone. Raises as `picture_facts`."""
    with _picture(path) as image:
        for frame in ImageSequence.Iterator(image):
            yield _as_rgb(frame)


@functools.lru_cache(maxsize=1024)
def _facts(path: Path, changed: int, size: int) -> PictureFacts:
    """changed, size: of the file, as which it is known again."""
    notes = []
    with _picture(path) as image:
        frames = getattr(image, "n_frames", 1)
        duration = image.info.get("duration")  # ms, of the first frame
        orientation = int(image.getexif().get(ORIENTATION, 1))
        width, height = image.size
        if orientation in range(2, 9):
            notes.append(f"{path.name} is turned the right way up, as its EXIF data say")
            if orientation >= 5:
                width, height = height, width
        image.load()
        if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
            notes.append(f"{path.name} is transparent in parts, which are shown on white")
    fps = 1000 / duration if frames > 1 and isinstance(duration, int | float) and duration > 0 else None
    return PictureFacts(height, width, frames, fps, tuple(notes))


def first_frame_note(path: Path, facts: PictureFacts) -> list[str]:
    """What is said of an animation that is used as a picture."""
    if facts.frames == 1:
        return []
    return [f"{path.name} has {counted(facts.frames, 'frame')}, of which the first is used"]


def check_sides(path: Path, height: int, width: int) -> None:
    """Raises ConfigError for a picture or video that is too small to show anything, or larger than any model takes."""
    if min(height, width) < LEAST_SIDE or max(height, width) > MOST_SIDE:
        small = min(height, width) < LEAST_SIDE
        raise ConfigError(
            f"{path} is {width}×{height} pixels: {'too small' if small else 'too large'}. Sides from {LEAST_SIDE} to "
            f"{MOST_SIDE:,} pixels are taken" + ("" if small else "; make it smaller first")
        )


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    """An open picture, whose size has been checked and whose pixels have not been read."""
    try:
        with _opened(path) as image:
            width, height = image.size
            check_sides(path, height, width)
            yield image
    except Image.UnidentifiedImageError as error:
        raise ConfigError(f"{path} is no picture in a format that is read here: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{path} is too large: sides of at most {MOST_SIDE:,} pixels are taken ({error})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged and cannot be read as a picture: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # the sides are checked, of the size that it says
        try:
            image = Image.open(path, formats=known)
        except Image.UnidentifiedImageError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    with image:
        yield image


def _as_rgb(image: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I;16", "I;16L", "I;16B", "I", "F"):  # Pillow would cut these off at 255
        turned = _eight_bits(turned)
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    rgba = turned.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (*WHITE, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, or of whole numbers or floats in the range of 16 bits, 8 bits or 0 … 1, in 8 bits."""
    pixels = np.asarray(image).astype(np.float64)
    most = float(pixels.max())
    peak = 65535.0 if image.mode.startswith("I;16") or most > 255 else 255.0 if most > 1 else 1.0
    return Image.fromarray((pixels / peak * 255).clip(0, 255).round().astype(np.uint8))
