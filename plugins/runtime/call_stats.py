"""Call stats: what every attention call of a patched denoiser really did.

Counts and sums only, by layer and kind of call: their size depends on the model, not on how many calls, sizes or prompts came.
"""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

SPARSE, DENSE_STEP, DENSE_LAYER, FALLBACK = "sparse", "dense step", "dense layer", "fallback"
GLOBAL_PATH = "global path"  # beside a sparse path through the same layer
WINDOW = "dense window"  # a chunk of frames over the whole window of a KV cache
SHORT = "short"  # dense on purpose, as the method would not be faster over so few tokens

MAX_REASONS = 16  # of one layer, apart from the numbers in them
OTHER_REASONS = "other reasons"
MAX_EVENTS = 256  # pairs of device events that one record keeps
MAX_SHAPES = 8  # shapes of calls whose measurements one record keeps apart


@dataclass(frozen=True)
class CallKind:
    """What calls that are counted together have in common.

    Attributes:
        kind: one of the names above.
        backend: what computed the attention.
        reason: why a call was dense, or why a sparse one did not run in the precision that was asked for; "" if there is none.
        fused: whether the family's fused kernels made its query and key, rather than stock code.
    """

    kind: str
    backend: str = "stock"
    reason: str = ""
    fused: bool = False


@dataclass
class Measurements:
    """Weighted sums of what only the device knows of dynamic calls. Reading one waits for the device; adding does not.

    The weights are those of a mean over token pairs or query rows:

        density         Σ pairs · density ÷ Σ pairs
        recall, probe   Σ queries · value ÷ Σ queries       each query row has an attention mass of 1
        broken          Σ value                             a count
    """

    # (names that came together, token pairs, query rows) → (sum of each, float64; how many calls gave them). Calls of one shape
    # have one weight, which is applied when sums are read or folded, so that adding launches no kernel for it.
    shapes: dict[tuple[tuple[str, ...], int, int], tuple[torch.Tensor, int]] = field(default_factory=dict)
    folded: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)  # name → (weighted sum, sum of weights)

    def add(self, values: dict[str, torch.Tensor], pairs: int, queries: int) -> None:
        """values: () float32 tensors on one device by name; not every call has all."""
        if not values:
            return
        key, new = (tuple(values), pairs, queries), torch.stack(list(values.values())).double()
        if key in self.shapes:
            # Out of place, and on the first call's device: calls may run on several, and in inference mode or not.
            before, calls = self.shapes[key]
            self.shapes[key] = before + new.to(before.device), calls + 1
            return
        if len(self.shapes) >= MAX_SHAPES:
            self._fold()
        self.shapes[key] = new, 1

    def total(self, name: str) -> tuple[float, int]:
        """(weighted sum, sum of the weights) over the calls that gave it."""
        self._fold()
        value, weight = self.folded.get(name, (0.0, 0))
        return float(value), weight

    def _fold(self) -> None:
        for (names, pairs, queries), (sums, calls) in self.shapes.items():
            for at, name in enumerate(names):
                weight = {"density": pairs, "broken": 1}.get(name, queries)
                if name in self.folded:
                    before, weights = self.folded[name]
                    self.folded[name] = before + (sums[at] * weight).to(before.device), weights + weight * calls
                else:
                    self.folded[name] = sums[at] * weight, weight * calls
        self.shapes.clear()


@dataclass
class CallRecord:
    """Calls of one kind in one layer: their token pairs, their time on the device, and what dynamic ones measured.

    Attributes:
        calls: how many.
        queries: query rows of all of them, once for all heads: Σ batch · queries.
        pairs: token pairs of all of them, the same way: Σ batch · queries · keys.
        known: token pairs of the calls whose density was known before they ran.
        kept: how many of ``known`` were kept, in the mean over heads.
        cost: the same with pairs of a query and a mean.
        means: Σ pairs · means ÷ keys, over the calls whose density only the device knows.
        extra: token pairs that methods computed beside their plans.
        measurements: the rest's density, which only the device knows; a call captured into a CUDA graph has none.
        heads: of those with lists for each head, Σ pairs · density of a head, (H,) float64, and Σ pairs; None if there were none.
        reasons_differ: whether the calls' reasons are not all the one that is shown, but only alike but for numbers.
    """

    calls: int = 0
    queries: int = 0
    pairs: int = 0
    known: int = 0
    kept: float = 0.0
    cost: float = 0.0
    means: float = 0.0
    extra: float = 0.0
    wall: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)
    heads: tuple[torch.Tensor, int] | None = None
    reasons_differ: bool = False

    def count(self, queries: int, pairs: int, call: Call) -> None:
        """Add a call."""
        self.calls += 1
        self.queries += queries
        self.pairs += pairs
        self.extra += call.extra * pairs
        if call.density is None:
            self.means += call.means * pairs
        else:
            self.known += pairs
            self.kept += call.density * pairs
            self.cost += (call.density if call.cost is None else call.cost) * pairs

    def add_heads(self, density: torch.Tensor, pairs: int) -> None:
        """Add what each head kept of a call, (H,) on the device. Not waited for."""
        new = density.double() * pairs
        if self.heads is not None and self.heads[0].shape == new.shape:
            sums, before = self.heads
            new, pairs = sums + new.to(sums.device), before + pairs  # out of place: in inference mode or not
        self.heads = new, pairs

    def kept_pairs(self) -> tuple[float, int]:
        """(token pairs that were kept, token pairs of the calls whose density is known); waits for the device."""
        kept, pairs = self.measurements.total("density")
        return self.kept + kept, self.known + pairs

    def cost_pairs(self) -> float:
        """Of the same calls, the pairs that were kept, those of a query and a mean (one for each block that is skipped), and
        those computed beside the plan."""
        kept, pairs = self.measurements.total("density")
        unknown = self.pairs - self.known
        return self.cost + self.extra + kept + ((pairs - kept) * self.means / unknown if unknown else 0.0)

    def add_time(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Keep a pair of device events; fold those that are long done, so that a long session does not pile them up."""
        self.events.append((start, end))
        half = MAX_EVENTS // 2
        # Asks, does not wait; the latest first. Threads may have streams of their own, which end in no order.
        if len(self.events) >= MAX_EVENTS and all(end.query() for _, end in reversed(self.events[:half])):
            self._fold(half)

    def seconds(self) -> float:
        """Seconds spent; waits for the GPU if it is still at work on them."""
        if self.events:
            self.events[-1][1].synchronize()
            for _, end in self.events[:-1]:
                if not end.query():  # on another thread's stream
                    end.synchronize()
            self._fold(len(self.events))
        return self.wall

    def _fold(self, count: int) -> None:
        self.wall += sum(start.elapsed_time(end) for start, end in self.events[:count]) / 1e3  # of milliseconds
        del self.events[:count]


class Call:
    """A call that is being counted: what it turns out to be is filled in before it ends. Without a kind it counts as nothing.

    Attributes:
        density: kept ÷ all token pairs; None where only the device knows it.
        cost: the same with pairs of a query and a mean; None: as density.
        means: where only the device knows the density, means ÷ keys: one for each block that is skipped.
        extra: token pairs that the method computes beside its plan ÷ all.
        values: what a dynamic call measured, () tensors by name.
        heads: what each head of a dynamic call kept, (H,) on the device; None: not known.
    """

    def __init__(self, kind: CallKind | None) -> None:
        self.kind = kind
        self.density: float | None = 1.0
        self.cost: float | None = None
        self.means = 0.0
        self.extra = 0.0
        self.values: dict[str, torch.Tensor] = {}
        self.heads: torch.Tensor | None = None


class _Timer:
    """Device events on a GPU (no host sync), else the wall clock. In a CUDA graph that is being captured it measures nothing."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.captured = on_gpu and torch.cuda.is_current_stream_capturing()
        self._begin = time.perf_counter()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if on_gpu and not self.captured:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._stream = torch.cuda.current_stream(device)  # of this device, which need not be the current one
            self._events[0].record(self._stream)

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record(self._stream)
        self._seconds = time.perf_counter() - self._begin

    def add_to(self, record: CallRecord) -> None:
        if self._events is not None:
            record.add_time(*self._events)
        else:
            record.wall += self._seconds


class CallStats:
    """Records by (layer number, kind of call). Threads add to the same records.

    lock: held while a record is changed, and by who reads several. since: when counting began, UTC.
    exchanges: between the ranks of context parallelism, two for each call.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.since = datetime.datetime.now(datetime.UTC)
        self.records: dict[tuple[int, CallKind], CallRecord] = defaultdict(CallRecord)
        self.exchanges = CallRecord()
        self.skipped_layers: dict[str, str] = {}  # layers never taken over, with the reason
        self._reasons: dict[int, dict[str, str]] = defaultdict(
            dict
        )  # of a layer: wording → the first reason of that wording

    def restart(self) -> None:
        """Count anew. Only with ``lock`` held. Layers that were never taken over stay known."""
        self.records.clear()
        self.exchanges = CallRecord()
        self._reasons.clear()
        self.since = datetime.datetime.now(datetime.UTC)

    @contextmanager
    def record(self, layer: int, kind: CallKind | None, query: torch.Tensor, key: torch.Tensor) -> Iterator[Call]:
        """Count the call in the ``with`` block and time it: device events on a GPU (no host sync), else the wall clock.

        Args:
            kind: None: the block says what the call was, by giving ``Call.kind``.
            query, key: (B, S, H, D), whose token pairs are counted.

        A call that is captured into a CUDA graph is counted once; its time, its replays and what it measured are not seen.
        """
        call = Call(kind)
        timer = _Timer(query.device)
        yield call
        if call.kind is None:
            return
        timer.stop()
        queries = query.shape[0] * query.shape[1]
        pairs = queries * key.shape[1]
        with self.lock:
            record = self._record_of(layer, call.kind)
            record.count(queries, pairs, call)
            if timer.captured:
                return
            record.measurements.add(call.values, pairs, queries)
            if call.heads is not None:
                record.add_heads(call.heads, pairs)
            timer.add_to(record)

    @contextmanager
    def exchange(self, x: torch.Tensor) -> Iterator[None]:
        """Time an exchange between the ranks of context parallelism, on the device of ``x``; waiting for the others included."""
        timer = _Timer(x.device)
        yield
        timer.stop()
        with self.lock:
            self.exchanges.calls += 1
            if not timer.captured:
                timer.add_to(self.exchanges)

    def _record_of(self, layer: int, kind: CallKind) -> CallRecord:
        """Reasons hold sizes and token counts: those that differ in numbers alone count together, under the first one."""
        if not kind.reason:
            return self.records[layer, kind]
        reasons, wording = self._reasons[layer], re.sub(r"\d+", "0", kind.reason)
        if wording not in reasons and len(reasons) < MAX_REASONS:
            reasons[wording] = kind.reason
        shown = reasons.get(wording, OTHER_REASONS)
        record = self.records[layer, replace(kind, reason=shown)]
        record.reasons_differ |= kind.reason != shown
        return record
