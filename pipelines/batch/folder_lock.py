"""Lock a batch's folder: one batch at a time, of one or more processes, on one machine or several that share the folder.

Two kinds of advisory locks (flock), which the system drops when their process ends, however it ends:

    .batch.lock          held shared by every process of the batch; its content says which batch that is
    .batch.rank-N.lock   held exclusively by process N while it works

Who gets .batch.lock exclusively is alone in the folder: the first to come, who may clean up after an earlier batch, and the
last to leave, who merges what the processes wrote. No message passes between processes, so that none can hang on a dead one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from tilewise.plugins.errors import ConfigError

GRACE = 3.0  # seconds for which another process may hold a lock just to look whether it is free


class BusyError(ConfigError):
    """Another batch is at work in the folder."""


class FolderLock:
    """The locks of one process. identity: text that is equal for the processes of one batch and for no other batch.

    Raises BusyError from `enter` if another batch, or the same process of this one, is in the folder. On a file system
    without locks it raises OSError.
    """

    def __init__(self, folder: Path, identity: str, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.identity, self.rank, self.world_size = folder, identity, rank, world_size
        self._shared: int | None = None
        self._own: int | None = None

    def enter(self, when_first: Callable[[], None]) -> None:
        """Joins the batch; the first process calls `when_first` while nobody else is in the folder."""
        self._shared = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = None
            while not self._try_enter(when_first):
                # Held exclusively: someone is cleaning up or merging, which ends; how long it takes depends on the work.
                deadline = deadline or time.monotonic() + 600
                if time.monotonic() > deadline:
                    raise self._busy()
                time.sleep(0.05)
            self._own = os.open(self._rank_path(self.rank), os.O_RDWR | os.O_CREAT, 0o666)
            deadline = time.monotonic() + GRACE
            while not _flock(self._own, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise self._busy()
                time.sleep(0.05)
        except BaseException:
            self._close()
            raise

    def stop_working(self) -> None:
        """Says to the other processes that this one has done its share."""
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def others_working(self) -> bool:
        """Whether any other process of the batch is at work."""
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            try:
                handle = os.open(self._rank_path(rank), os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                if not _flock(handle, fcntl.LOCK_SH):
                    return True
            finally:
                os.close(handle)
        return False

    def leave(self, when_last: Callable[[], None]) -> None:
        """Leaves the batch; the last process to leave calls `when_last`. Harmless if `enter` failed or was not called."""
        try:
            self.stop_working()
            if self._shared is not None and _flock(self._shared, fcntl.LOCK_EX):
                when_last()
        finally:
            self._close()

    @property
    def _path(self) -> Path:
        return self.folder / ".batch.lock"

    def _rank_path(self, rank: int) -> Path:
        return self.folder / f".batch.rank-{rank}.lock"

    def _try_enter(self, when_first: Callable[[], None]) -> bool:
        assert self._shared is not None
        if _flock(self._shared, fcntl.LOCK_EX):
            when_first()
            os.ftruncate(self._shared, 0)
            os.pwrite(self._shared, self.identity.encode(), 0)
        # Also after LOCK_EX, which this turns into the shared one: not in one step, so that the content is read again.
        if not _flock(self._shared, fcntl.LOCK_SH):
            return False
        if os.pread(self._shared, 4096, 0).decode() != self.identity:
            raise self._busy()
        return True

    def _busy(self) -> BusyError:
        return BusyError(
            f"another batch is at work in {self.folder} (or this one was started twice); wait for it to end, or give "
            "another --out folder"
        )

    def _close(self) -> None:
        for handle in (self._own, self._shared):
            if handle is not None:
                os.close(handle)
        self._own = self._shared = None


def _flock(handle: int, kind: int) -> bool:
    """Takes a lock without waiting; False if someone else's stands against it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
