"""Slots of a cache's window: which frames are seen, that none is lost, and that nothing moves needlessly."""

from __future__ import annotations

import random

import pytest

from tilewise.plugins.streaming.slots import Slots


def test_the_example_of_the_docstring():
    slots = Slots(window=8, sink=1)
    for _ in range(4):
        slots.begin(2)
        slots.commit()
    assert slots.frames == [0, 1, 2, 3, 4, 5, 6, 7]
    change = slots.begin(2)
    assert change.evicted == ((1, 1), (2, 2)) and change.moves == ((6, 1), (7, 2))
    assert slots.frames == [0, 6, 7, 3, 4, 5] and slots.current == range(6, 8) and slots.next_frame == 8


@pytest.mark.parametrize("seed", range(20))
def test_the_window_holds_the_sink_and_the_newest_frames(seed):
    """Chunks of any lengths, some of them begun twice: a mirror of the buffers finds each frame where the slots say."""
    rng = random.Random(seed)
    sink = rng.randint(0, 4)
    window = sink + rng.randint(3, 12)
    slots, content = Slots(window, sink), [None] * window
    forgotten = 0  # frames before this one may be missing
    for _ in range(40):
        chunk = rng.randint(1, min(4, window - sink))
        change = slots.begin(chunk)
        assert [content[slot] for slot, _ in change.evicted] == [frame for _, frame in change.evicted]
        assert [frame for _, frame in change.evicted] == sorted(frame for _, frame in change.evicted)
        for source, target in change.moves:
            content[target] = content[source]
        if rng.random() < 0.2:  # a chunk that is dropped, and all but a few frames forgotten
            kept = rng.randint(0, 2)
            newest = slots.ring[len(slots.ring) - kept :] if kept else []
            for source, target in slots.flush(kept).moves:
                content[target] = content[source]
            assert content[: len(slots.frames)] == slots.frames and slots.ring == newest
            forgotten = slots.next_frame - kept
            slots.begin(chunk)
            content[slots.current.start :] = [None] * (window - slots.current.start)
            for i, slot in enumerate(slots.current):
                content[slot] = slots.next_frame + i
            slots.commit()
            continue
        if rng.random() < 0.2:
            assert slots.begin(chunk) == type(change)()  # nothing leaves twice
        for i, slot in enumerate(slots.current):
            content[slot] = slots.next_frame + i
        seen = set(content[: slots.end])
        newest = slots.next_frame + chunk
        own = set(range(slots.next_frame, newest))
        assert {*own, *range(min(sink, newest))} <= seen and seen <= {*range(min(sink, newest)), *range(newest)}
        if forgotten <= max(0, newest - (window - sink)):
            assert seen == {*range(min(sink, newest)), *range(max(0, newest - (window - sink)), newest)}
        slots.commit()
        assert content[: len(slots.frames)] == slots.frames


def test_dropped_frames_come_again_under_their_numbers():
    slots = Slots(window=9, sink=3)
    for _ in range(5):
        slots.begin(3)
        slots.commit()
    assert slots.drop_ring() == [9, 10, 11, 12, 13, 14] and slots.next_frame == 9 and slots.frames == [0, 1, 2]
    slots.begin(3)
    slots.commit()
    assert slots.ring == [9, 10, 11]


def test_state_comes_back():
    slots, other = Slots(6, 1), Slots(6, 1)
    for _ in range(4):
        slots.begin(2)
        slots.commit()
    other.load_state_dict(slots.state_dict())
    assert other.begin(2) == slots.begin(2) and other.frames == slots.frames and other.next_frame == slots.next_frame
