"""Ctrl-C in a batch or a stream: the first press finishes the current clip or chunk, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which SIGINT is asked about instead of raised. Outside of the main thread, it changes nothing.

    what: is finished after the first press, as the note calls it.
    """

    def __init__(self, note: Callable[[str], None], what: str = "clip") -> None:
        self.note = note
        self._what = what
        self._count = 0
        self._working = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._count > 0

    def finish_first(self, working: bool) -> None:
        """Says whether there is something at work that is worth finishing; otherwise the first Ctrl-C leaves at once."""
        self._working = working

    def _interrupt(self, _: int, __: FrameType | None) -> None:
        self._count += 1
        if self._count > 1 or not self._working:
            raise KeyboardInterrupt
        self.note(f"interrupted: finishing this {self._what}; Ctrl-C again leaves at once")
