"""The books: what every attention call of a patched denoiser really did."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

SPARSE, DENSE_STEP, DENSE_LAYER, FALLBACK = "sparse", "dense step", "dense layer", "fallback"
FULL_PATH = "full path"  # dense on purpose, beside a sparse path through the same layer


@dataclass(frozen=True)
class Entry:
    """What one call was: its kind, and for a sparse one its density and backend, for a fallback the reason.

    fused: whether the family's fused kernels made its query and key, rather than stock code.
    """

    kind: str
    density: float = 1.0
    backend: str = "stock"
    reason: str = ""
    fused: bool = False


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded into a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclass
class Tally:
    """Calls of one kind in one layer, and their time on the device."""

    calls: int = 0
    wall: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Keep a pair of device events; fold those that are long done, so that a long session does not pile them up."""
        self.events.append((start, end))
        if len(self.events) >= 256 and self.events[127][1].query():  # asks, does not wait
            self._fold(128)

    def seconds(self) -> float:
        """Seconds spent; waits for the GPU if it is still at work on them."""
        if self.events:
            self.events[-1][1].synchronize()
            self._fold(len(self.events))
        return self.wall

    def _fold(self, count: int) -> None:
        self.wall += sum(start.elapsed_time(end) for start, end in self.events[:count]) / 1e3
        del self.events[:count]


class Ledger:
    """Tallies by (layer number, entry)."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, Entry], Tally] = defaultdict(Tally)
        self.skipped_layers: dict[str, str] = {}  # layers never taken over, with the reason

    @contextmanager
    def record(self, layer: int, entry: Entry, device: torch.device) -> Iterator[None]:
        """Count the call in the ``with`` block and time it: device events on a GPU (no host sync), else the wall clock.

        A call that is captured into a CUDA graph is counted once, and neither its time nor its replays are seen.
        """
        tally = self.tallies[layer, entry]
        tally.calls += 1
        if capturing(device):
            yield
        elif device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)  # of q's device, which need not be the current one
            start.record(stream)
            yield
            end.record(stream)
            tally.add(start, end)
        else:
            begin = time.perf_counter()
            yield
            tally.wall += time.perf_counter() - begin
