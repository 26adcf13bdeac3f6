"""How far a stream is, on stderr: frames out, their rate, and how far they are ahead of somebody who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tilewise.pipelines.streaming.record import Progress

SECONDS = 5.0  # between two lines where there is no terminal


def words(at: Progress, fps: float) -> str:
    """One line. fps: of playback."""
    gap = f"{at.ahead:.1f} s ahead of playback" if at.ahead >= 0 else f"{-at.ahead:.1f} s behind playback"
    return (
        f"stream {at.frames}/{at.total} frames, {at.frames / fps:.1f} s of {at.total / fps:.1f} s out, "
        f"{at.fps:.2f} FPS, {gap}"
    )


@contextmanager
def stream_progress(console: Console, fps: float) -> Iterator[Callable[[Progress], None]]:
    """A line that changes; into a file or pipe a line for the first and the last chunk, and every few seconds between."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=False) as live:
            yield lambda at: live.update(Text(words(at, fps)))
        return
    said: float | None = None

    def say(at: Progress) -> None:
        nonlocal said
        now = time.monotonic()
        if said is None or now - said >= SECONDS or at.frames >= at.total:
            said = now
            console.print(words(at, fps), soft_wrap=True)

    yield say
