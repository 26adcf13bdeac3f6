"""Write a clip that took long to make; where that fails, save its frames in a way that hardly can."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.files import replacing, write_text
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.media.video import write_video


class RescuedError(OutputError):
    """A clip could not be written, and its frames are saved in the file ``frames`` (NumPy's .npy) instead."""

    def __init__(self, message: str, frames: Path) -> None:
        super().__init__(message)
        self.frames = frames


def write_or_rescue(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: float,
    *,
    settings: Mapping[str, Any] | None = None,
    beside: bool = True,
) -> Path:
    """`write_video`; where that fails, frames (T, H, W, 3) uint8 go to NAME.frames.npy and settings to NAME.frames.json, beside
    the clip or else in the folder for temporary files.

    Raises RescuedError, which says where, or OutputError if nothing could be saved.
    """
    try:
        return write_video(path, frames, fps, settings=settings, beside=beside)
    except Exception as error:  # whatever it was: the frames are there, and making them again takes long
        reason = str(error) or type(error).__name__
        saved, why_not = _saved(Path(path), frames, settings)
        if saved is None:
            raise OutputError(f"{reason}; nor could its frames be saved: {'; '.join(why_not)}") from error
        raise RescuedError(
            f"{reason}; the frames of the clip are saved in {saved} (uint8, T × H × W × 3, {fps:g} a second), which numpy.load "
            "reads, and its settings beside it",
            saved,
        ) from error


def _saved(path: Path, frames: NDArray, settings: Mapping[str, Any] | None) -> tuple[Path | None, list[str]]:
    """Where the frames went, or why they are nowhere."""
    why_not = []
    for folder in (path.absolute().parent, None):
        try:
            if folder is None:
                folder = Path(tempfile.mkdtemp(prefix="tilewise-rescued-"))
            folder.mkdir(parents=True, exist_ok=True)
            with Outputs(folder / f"{path.stem}.frames.npy").claimed() as (file,):
                with replacing(file) as part, part.open("wb") as stream:
                    np.save(stream, np.ascontiguousarray(frames))
                if settings is not None:
                    write_text(file.with_suffix(".json"), json.dumps(settings, indent=2, default=str) + "\n")
            return file, []
        except OSError as error:
            why_not.append(f"{folder or 'the folder for temporary files'}: {error.strerror or error}")
    return None, why_not
