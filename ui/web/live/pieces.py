"""The bytes of an mp4 file that grows, for readers that come and go.

The encoder's thread puts whole pieces in: the header first, then fragments. Readers are coroutines of the server. One that comes
later gets the header and the newest fragments: each says at what time it is to be shown, so that a player begins there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque

MOST = 8 * 2**20  # bytes that a reader may be behind before the encoder waits for it
NEWEST = 2  # fragments that a later reader gets at once


class Pieces:
    """See the module. `left`: since when nobody reads, by `time.monotonic`; None while somebody does."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.left: float | None = time.monotonic()
        self.changed = threading.Condition()
        self._header: bytes | None = None
        self._kept: deque[bytes] = deque()
        self._first = 0  # number of the first fragment that is kept
        self._readers: list[Reader] = []
        self._was_read = self._waits_for_none = self._ended = False

    def put(self, piece: bytes) -> None:
        """The next bytes; returns when no reader is far behind. Called by one thread."""
        with self.changed:
            if self._header is None:
                self._header = piece
            else:
                self._kept.append(piece)
            self._forget()
            self._wake()
            self.changed.wait_for(lambda: self._waits_for_none or self._behind() <= self.most)

    def hurry(self) -> None:
        """Let `put` wait for nobody any more: the end is near."""
        with self.changed:
            self._waits_for_none = True
            self.changed.notify_all()

    def end(self) -> None:
        """There will be no more. Readers get what is left."""
        with self.changed:
            self._ended = self._waits_for_none = True
            self._wake()
            self.changed.notify_all()

    @property
    def ended(self) -> bool:
        return self._ended

    def reader(self) -> Reader:
        """A reader for the running event loop; close it."""
        with self.changed:
            newest = self._first + max(0, len(self._kept) - NEWEST)
            one = Reader(self, newest if self._was_read else self._first)
            self._was_read, self.left = True, None
            self._readers.append(one)
            return one

    # ── for readers, with `changed` held ─────────────────────────────────────────────────────────────────────────

    def take(self, number: int) -> bytes | None:
        """A fragment; -1: the header. None: not there yet."""
        if number < 0:
            return self._header
        at = number - self._first
        return self._kept[at] if at < len(self._kept) else None

    def leave(self, reader: Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self.left = None if self._readers else time.monotonic()
        self.changed.notify_all()

    def _behind(self) -> int:
        """Bytes that the slowest reader has not had."""
        kept = list(self._kept)
        return max((sum(map(len, kept[max(0, one.number - self._first) :])) for one in self._readers), default=0)

    def _forget(self) -> None:
        """Drop fragments that all readers had, but for the newest."""
        wanted = min((one.number for one in self._readers), default=self._first + len(self._kept))
        if not self._was_read:
            wanted = self._first  # the first reader has not come yet
        total = sum(map(len, self._kept))
        while len(self._kept) > NEWEST and (self._first < wanted or total > 2 * self.most):
            total -= len(self._kept.popleft())
            self._first += 1

    def _wake(self) -> None:
        for one in self._readers:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                one.loop.call_soon_threadsafe(one.woken.set)


class Reader:
    """Made by `Pieces.reader`. number: of the fragment that comes next."""

    def __init__(self, pieces: Pieces, number: int) -> None:
        self.pieces, self.number = pieces, number
        self.loop = asyncio.get_running_loop()
        self.woken = asyncio.Event()
        self._has_header = False

    async def next(self) -> bytes | None:
        """The next piece; None at the end. May be cancelled while it waits: nothing is lost."""
        while True:
            with self.pieces.changed:
                self.woken.clear()
                piece = self.pieces.take(self.number if self._has_header else -1)
                if piece is not None:
                    self.number += self._has_header
                    self._has_header = True
                    self.pieces.changed.notify_all()
                    return piece
                if self.pieces.ended:
                    return None
            await self.woken.wait()

    def close(self) -> None:
        with self.pieces.changed:
            self.pieces.leave(self)
