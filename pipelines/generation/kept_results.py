"""Results of long work, kept in a folder one by one, so that a run that ends early goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.files import write_text


class KeptResults:
    """JSON objects by the settings of the clip that they were made with.

    Args:
        folder: made with the first result.
        kind: what they are, the beginning of their files' names.
        said: JSON values of everything that a result depends on beside its settings: the model's revision, device, dtype.
    """

    def __init__(self, folder: Path, kind: str, said: Any) -> None:
        self.folder, self.kind, self.said = folder, kind, said

    def read(self, settings: GenerateSettings) -> Any:
        """The result that was made with these settings; None if there is none, or not a whole one."""
        try:
            return json.loads(self._path(settings).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def count(self, jobs: Sequence[GenerateSettings]) -> int:
        """How many of these are there."""
        return sum(self.read(settings) is not None for settings in jobs)

    def keep(self, settings: GenerateSettings, result: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(settings), json.dumps(result))

    def remove(self) -> None:
        """Once all are used. Other files in the folder stay."""
        for file in self.folder.glob(f"{self.kind}-*.json"):
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, settings: GenerateSettings) -> Path:
        text = json.dumps([settings.to_dict(), self.said], sort_keys=True)
        return self.folder / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
