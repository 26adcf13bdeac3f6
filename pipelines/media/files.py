"""Write output files atomically: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from tilewise.pipelines.errors import OutputPathError

STILL = ".png"  # a clip of one frame
LEAST_FPS, MOST_FPS = (
    0.01,
    1000.0,
)  # of what is written: ffmpeg counts time in whole ticks, and players do not show more
PART = re.compile(r"\..+\.\d+-[0-9a-f]{6}\.part", re.DOTALL)  # a file that is being written


def is_still(path: str | Path) -> bool:
    """Whether a name is a picture's and not a clip's."""
    return Path(path).suffix.lower() == STILL


def suffix_of(frames: int) -> str:
    """What a clip of so many frames is written as where nobody says otherwise."""
    return STILL if frames == 1 else ".mp4"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a name ending in .part, in the folder of `path`, to write to; renames it to `path` if the block ends well.

    The data is on disk before the rename, so that even after a power cut `path` holds the old content or the new one.
    If the block raises anything, KeyboardInterrupt included, the .part file is removed and `path` is left as it was.
    """
    path = Path(path)
    part, handle = _new_part(path)
    try:
        yield part
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)  # after the rename there is none left
        os.close(handle)


def remove_stale(folder: Path) -> None:
    """Removes what processes that were killed left half-written in a folder.

    A process holds a lock (flock) on each of its .part files, which the system drops when it ends, however it ends: one that can
    be locked is nobody's any more. On a file system without locks nothing is removed.
    """
    for path in folder.iterdir():
        if not PART.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def could_not_write(path: str | Path, error: Exception) -> str:
    """A sentence on why a file could not be written; of a full disk, which one."""
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"could not write {path}: {error}"
    folder = Path(path).absolute().parent
    disk = next(one for one in (folder, *folder.parents) if one.is_mount() or one == one.parent)
    return f"could not write {path}: the disk mounted at {disk} is full ({error.strerror})"


def move_into_place(part: Path, path: Path) -> None:
    """Renames a finished file to `path`, on the same disk; its data is on disk before."""
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text so that `path` is never half-written."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def sidecar(path: str | Path) -> Path:
    """Where a clip's settings lie as JSON: beside it, under the same name.

    A picture's have its ending too: a clip may have the same name.
    """
    path = Path(path)
    return path.with_name(f"{path.name}.json") if is_still(path) else path.with_suffix(".json")


def check_writable(path: str | Path, *, suffix: str = ".mp4", create: bool = True) -> Path:
    """Makes sure, before long work, that `path` can be written later, and returns it as a Path.

    The parent folder is created if need be, and a file is really written there and removed: permission bits do not tell
    about read-only mounts or root. What killed processes left half-written in the folder is removed too. With `create=False`
    nothing is touched, and only what can be seen is checked.

    Raises OutputPathError for another suffix than `suffix`, a directory, a read-only file, or a folder that cannot be made
    or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputPathError(f"cannot write {path}: it is a directory; try {path / ('clip' + suffix)}")
    if path.suffix.lower() != suffix:
        raise OutputPathError(f"cannot write {path}: the output is a {suffix} file; try {path.with_suffix(suffix)}")
    # A rename would replace it all the same, but whoever took the permission away wants the file kept.
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputPathError(f"cannot write {path}: there is such a file, and it is read-only")
    folder = path.parent
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise OutputPathError(f"cannot write {path}: {existing} is a file, not a directory")
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            probe, handle = _new_part(path)
            probe.unlink()
            os.close(handle)
        else:
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied", str(existing))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputPathError(f"cannot write {path}: {reason} ({error.filename or folder})") from error
    return path


def check_sidecar(path: str | Path, *, keep: Path | None = None, create: bool = True) -> None:
    """`check_writable` for the settings beside the clip `path`; `keep` is a file of the user's that they must not replace.

    Raises OutputPathError, naming clip and settings file.
    """
    target = sidecar(path)
    if target.is_dir():
        raise OutputPathError(f"cannot write {path}: its settings go to {target}, which is a directory")
    if keep is not None and target.exists() and keep.exists() and target.samefile(keep):
        raise OutputPathError(
            f"cannot write {path}: its settings go to {target}, which is the config that --method names; "
            "choose another name for the clip"
        )
    check_writable(target, suffix=".json", create=create)


def _new_part(path: Path) -> tuple[Path, int]:
    """A new file beside `path` to write its content to, and the handle that holds its lock."""
    while True:
        part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.part")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # where there are no locks, nobody takes it for stale either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:  # else it was taken for stale just before the lock
            return part, handle
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
