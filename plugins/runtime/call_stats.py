"""The books: what every attention call of a patched denoiser really did."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tilewise.kernels.device import capturing

SPARSE, DENSE_STEP, DENSE_LAYER, FALLBACK = "sparse", "dense step", "dense layer", "fallback"
FULL_PATH = "full path"  # dense on purpose, beside a sparse path through the same layer
SHORT = "short"  # dense on purpose, as the method would not be faster over so few tokens


@dataclass(frozen=True)
class Entry:
    """What one call was: its kind, and for a sparse one its density and backend, for a dense one the reason, if there is one.

    density: None where it is decided anew at each call: the tally then holds what they measured.
    fused: whether the family's fused kernels made its query and key, rather than stock code.
    """

    kind: str
    density: float | None = 1.0
    backend: str = "stock"
    reason: str = ""
    fused: bool = False


@dataclass
class Measured:
    """Sums over dynamic calls of what only the device knows. Reading one waits for the device; adding does not."""

    # Names that came together share one vector: (sum of each, float64), and how many calls gave them.
    sums: dict[tuple[str, ...], tuple[torch.Tensor, int]] = field(default_factory=dict)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """values: () float32 tensors on one device by name; not every call has all."""
        if not values:
            return
        names, new = tuple(values), torch.stack(list(values.values())).double()
        if names in self.sums:
            # Out of place, and on the first call's device: calls may run on several, and in inference mode or not.
            before, calls = self.sums[names]
            self.sums[names] = before + new.to(before.device), calls + 1
        else:
            self.sums[names] = new, 1

    def total(self, name: str) -> tuple[float, int]:
        """(sum, how many calls gave it)."""
        found = [(float(sums[names.index(name)]), n) for names, (sums, n) in self.sums.items() if name in names]
        return sum(value for value, _ in found), sum(n for _, n in found)


@dataclass
class Tally:
    """Calls of one kind in one layer, their time on the device, and what dynamic ones measured."""

    calls: int = 0
    wall: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)

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


class Call:
    """A call that is being counted: what it turns out to be is filled in before it ends. Without an entry it counts as nothing.

    values: what a dynamic call measured, () tensors by name.
    """

    def __init__(self, entry: Entry | None) -> None:
        self.entry = entry
        self.values: dict[str, torch.Tensor] = {}


class Ledger:
    """Tallies by (layer number, entry)."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, Entry], Tally] = defaultdict(Tally)
        self.skipped_layers: dict[str, str] = {}  # layers never taken over, with the reason

    @contextmanager
    def record(self, layer: int, entry: Entry | None, device: torch.device) -> Iterator[Call]:
        """Count the call in the ``with`` block and time it: device events on a GPU (no host sync), else the wall clock.

        entry: None: the block says what the call was, by giving ``Call.entry``.
        A call that is captured into a CUDA graph is counted once; its time, its replays and what it measured are not seen.
        """
        call = Call(entry)
        on_gpu, captured = device.type == "cuda", capturing(device)
        begin = time.perf_counter()
        start = end = None
        if on_gpu and not captured:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)  # of q's device, which need not be the current one
            start.record(stream)
        yield call
        if call.entry is None:
            return
        tally = self.tallies[layer, call.entry]
        tally.calls += 1
        if captured:
            return
        tally.measured.add(call.values)
        if start is not None and end is not None:
            end.record(stream)
            tally.add(start, end)
        else:
            tally.wall += time.perf_counter() - begin
