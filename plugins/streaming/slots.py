"""Which latent frame stands in which slot of the window: bookkeeping alone, on the host, without a tensor.

Slots 0 … S − 1 are the sink. While the window fills up, a chunk is written behind the last frame and stays there. When it is
full, the current chunk of c frames has the last c slots. Before the next chunk begins, those of its frames that stay take the
slots of the oldest ones: W = 8, S = 1, c = 2

    begin(2) → 6 7           frames   0 | 1 2 3 4 5 | 6 7
    begin(2) → 8 9           frames   0 | 6 7 3 4 5 | 8 9          1 and 2 left, 6 and 7 moved
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """What ``begin`` asks of the buffers, in this order.

    evicted: (slot, frame) of frames that leave, oldest first. moves: (from slot, to slot) of frames that stay.
    """

    evicted: tuple[tuple[int, int], ...] = ()
    moves: tuple[tuple[int, int], ...] = ()


class Slots:
    """The slots of one cache.

    Attributes:
        frames: the frame in each slot that holds a finished one, in order of slots: 0 … len − 1 are filled.
        next_frame: number of the frame that comes next.
        current: slots of the chunk under way; empty between chunks.
    """

    def __init__(self, window: int, sink: int) -> None:
        self.window = window
        self.sink = sink
        self.frames: list[int] = []
        self.next_frame = 0
        self.current = range(0)

    @property
    def end(self) -> int:
        """Slots before this one are attended to."""
        return len(self.frames) + len(self.current)

    @property
    def ring(self) -> list[int]:
        """Finished frames outside of the sink, oldest first."""
        return sorted(self.frames[self.sink :])

    @property
    def in_time(self) -> list[int]:
        """Slots that are attended to, the sink first, then the ring and the chunk under way, oldest first."""
        ring = sorted(range(min(self.sink, len(self.frames)), len(self.frames)), key=self.frames.__getitem__)
        return [*range(min(self.sink, len(self.frames))), *ring, *self.current]

    def begin(self, chunk: int) -> Change:
        """Make room for ``chunk`` frames. A chunk that was begun and not finished is dropped: its frames come again."""
        room = self.window - chunk
        self.current = range(0)
        ring = sorted(range(self.sink, len(self.frames)), key=self.frames.__getitem__)
        leaving = ring[: max(0, len(self.frames) - room)]
        evicted = tuple((slot, self.frames[slot]) for slot in leaving)
        staying = [slot for slot in ring[len(leaving) :] if slot >= room]
        moves = tuple(zip(staying, sorted(slot for slot in leaving if slot < room), strict=True))
        for source, target in moves:
            self.frames[target] = self.frames[source]
        del self.frames[room:]
        self.current = range(len(self.frames), len(self.frames) + chunk)
        return Change(evicted, moves)

    def commit(self) -> None:
        """The chunk under way is finished."""
        for _ in self.current:
            self.frames.append(self.next_frame)
            self.next_frame += 1
        self.current = range(0)

    def drop_ring(self) -> list[int]:
        """Forget all finished frames but the sink's; returns them, oldest first. The next chunk takes the first one's number."""
        dropped = self.ring
        del self.frames[self.sink :]
        self.current = range(0)
        if dropped:
            self.next_frame = dropped[0]
        return dropped

    def flush(self, keep: int) -> Change:
        """Forget all finished frames but the sink's and the last ``keep``."""
        ring = sorted(range(self.sink, len(self.frames)), key=self.frames.__getitem__)
        leaving, staying = ring[: max(0, len(ring) - keep)], ring[max(0, len(ring) - keep) :]
        end = min(self.sink, len(self.frames)) + len(staying)
        free = sorted(slot for slot in leaving if slot < end)
        moves = tuple(zip([slot for slot in staying if slot >= end], free, strict=True))
        for source, target in moves:
            self.frames[target] = self.frames[source]
        del self.frames[end:]
        self.current = range(0)
        return Change(moves=moves)

    def state_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"frames": list(self.frames), "next_frame": self.next_frame}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frames, self.next_frame, self.current = list(state["frames"]), int(state["next_frame"]), range(0)
