"""Clips of one frame as png files: lossless, with the settings that made the picture in a text chunk of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.files import STILL, could_not_write, replacing

CHUNK = "tilewise"  # keyword of the text chunk


def write_still(
    path: Path, frames: NDArray[np.uint8], settings: Mapping[str, Any] | None, before: Callable[[], None] = lambda: None
) -> None:
    """Writes (1, H, W, 3) uint8, whole or not at all. before: called once the picture is written and not yet under its name.

    Raises ValueError for more frames, OutputError where nothing can be written.
    """
    if len(frames) != 1:
        raise ValueError(
            f"a {STILL} file holds one frame, and the clip has {len(frames)}; give a name that ends in .mp4"
        )
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        chunks.add_itxt(CHUNK, json.dumps(settings, allow_nan=False))
    try:
        with replacing(path) as part:
            Image.fromarray(frames[0]).save(part, format="PNG", pnginfo=chunks)
            before()
    except OSError as error:
        raise OutputError(could_not_write(path, error)) from error


def read_still(path: str | Path) -> tuple[NDArray[np.uint8], dict[str, Any] | None]:
    """(1, H, W, 3) uint8, and the settings in the file, None if it holds none.

    Raises OutputError if the file is no picture.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))[None]
            text = getattr(image, "text", {}).get(CHUNK)
    except (OSError, ValueError) as error:
        raise OutputError(f"could not read {path} as a picture: {error}") from error
    try:
        settings = json.loads(text) if text else None
    except (ValueError, RecursionError):
        settings = None  # someone else's
    return pixels, settings if isinstance(settings, dict) else None
