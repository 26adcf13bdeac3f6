"""Pictures and videos that visitors upload: checked, and kept under the output folder by content, not by a name of theirs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tilewise.pipelines.media.checksum import file_sha256
from tilewise.pipelines.media.files import replacing
from tilewise.pipelines.media.input_picture import is_picture, picture_facts, picture_format
from tilewise.pipelines.media.input_video import video_facts
from tilewise.pipelines.memory.units import amount
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common.safety import RefusedError

FOLDER = "inputs"  # of the output folder
LARGEST = 64 * 2**20  # bytes of a file
MOST = 4 * 2**30  # bytes of all files that are kept
PICTURES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif"}
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".ts")


class Uploads:
    """A folder of files. folder: absolute; None: nothing is taken. arrived: where the server puts what visitors upload."""

    def __init__(self, folder: Path | None, arrived: Path) -> None:
        self.folder, self.arrived = folder, arrived.resolve()

    def kept(self, upload: Any) -> str:
        """Keeps a file that was uploaded, and returns its path. One that is kept already is returned as it is.

        Raises RefusedError for a file that is too large or was not uploaded, ConfigError for one that is no picture or video.
        """
        path = Path(str(upload)).resolve()
        if self.folder is None:
            raise RefusedError("this page makes clips from text alone")
        if path.parent == self.folder and path.is_file():
            return str(path)
        if not path.is_relative_to(self.arrived):  # Gradio checks it too; a visitor must not name files of the server
            raise RefusedError("a picture or video must be uploaded to this page")
        if not path.is_file():
            raise ConfigError("the uploaded file is no longer here: choose it again")
        size = path.stat().st_size
        if size > LARGEST:
            raise RefusedError(f"a picture or video has at most {amount(LARGEST)} here, not {amount(size)}")
        try:
            suffix = _suffix(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), path.name)) from error
        target = self.folder / f"{file_sha256(path)}{suffix}"
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            taken = sum(file.stat().st_size for file in self.folder.iterdir())
            if taken + size > MOST:
                raise RefusedError(
                    f"the files of earlier visitors take {amount(taken)}: {self.folder} must be tidied up first"
                )
            with replacing(target) as part:
                shutil.copyfile(path, part)
        return str(target)


def _suffix(path: Path) -> str:
    """A file's ending by its content, by which a browser knows what it gets. Raises ConfigError for no picture or video."""
    if is_picture(path):
        picture_facts(path)
        return PICTURES.get(picture_format(path), ".picture")
    video_facts(path, 1)
    own = path.suffix.lower()
    return own if own in VIDEOS else ".video"
