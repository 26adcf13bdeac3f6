"""Files that a clip is made from beside its prompt, as settings name them: "PATH", and once read "PATH@sha256:HEX"."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tilewise.pipelines.media.checksum import file_sha256
from tilewise.plugins.errors import ConfigError

ONE = ("image", "last_image", "video", "mask")  # settings that name one file
SEVERAL = ("reference",)
ROLES = (*ONE, *SEVERAL)
_SAID = re.compile(r"\s*(?P<path>\S.*?)(?:@sha256:(?P<sha256>[0-9a-f]{64}))?\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that settings name. sha256: of its content when it was first read; "": not read yet."""

    path: Path
    sha256: str = ""

    @classmethod
    def parse(cls, role: str, said: Any) -> InputFile:
        """From what `str` gives, or a path alone. Raises ConfigError for anything else."""
        found = _SAID.fullmatch(said) if isinstance(said, str) else None
        if found is None or "\0" in found["path"]:
            raise ConfigError(f"{flag(role)} takes a file's path, not {str(said)[:80]!r}")
        return cls(Path(found["path"]).expanduser(), found["sha256"] or "")

    def __str__(self) -> str:
        return f"{self.path}" + (f"@sha256:{self.sha256}" if self.sha256 else "")

    def resolved(self, role: str) -> InputFile:
        """With its absolute path and checksum. Raises ConfigError for a file that is not there, or not the one that was meant."""
        path = self.path.absolute()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise ConfigError(f"{flag(role)}: the file {self.path} {what}")
        try:
            sha256 = file_sha256(path)
        except OSError as error:
            raise ConfigError(f"{flag(role)}: cannot read {path}: {error.strerror or error}") from error
        if self.sha256 not in ("", sha256):
            raise ConfigError(
                f"{flag(role)}: {path} has changed since the clip was made from it: its SHA-256 is {sha256[:12]}…, and was "
                f"{self.sha256[:12]}…. Put that file back, or give {flag(role)} to use this one"
            )
        return InputFile(path, sha256)


def flag(role: str) -> str:
    return f"--{role.replace('_', '-')}"
