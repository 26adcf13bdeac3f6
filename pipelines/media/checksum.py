"""SHA-256 of a file's content, by which a clip's metadata and a batch know the files that a clip is made from."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """64 hex digits. A file that has not changed since is not read again. Raises OSError."""
    facts = path.stat()
    return _sha256(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, changed: int, size: int) -> str:
    """changed, size: of the file, as which it is known again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
