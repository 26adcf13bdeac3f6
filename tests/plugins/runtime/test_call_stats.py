"""Call stats: sums that are exact, weighed by token pairs, of bounded size, and timed by device events without waiting."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from tilewise.plugins.runtime.call_stats import (
    DENSE_LAYER,
    DENSE_STEP,
    FALLBACK,
    GLOBAL_PATH,
    MAX_EVENTS,
    MAX_REASONS,
    MAX_SHAPES,
    OTHER_REASONS,
    SHORT,
    SPARSE,
    CallKind,
    CallRecord,
    CallStats,
    Measurements,
)


def tensors(queries: int, keys: int | None = None, batch: int = 1, heads: int = 2):
    """(query, key), (B, S, H, D)."""
    return torch.empty(batch, queries, heads, 4), torch.empty(batch, queries if keys is None else keys, heads, 4)


def record(stats: CallStats, layer: int, kind: CallKind, qk, density=1.0, values=None) -> None:
    with stats.record(layer, None, *qk) as call:
        call.kind, call.density = kind, density
        call.values = {name: torch.tensor(value) for name, value in (values or {}).items()}


def size_of(stats: CallStats) -> int:
    """Everything that call stats hold, counted."""
    return (
        len(stats.records)
        + sum(len(reasons) for reasons in stats._reasons.values())
        + sum(len(r.events) + len(r.measurements.shapes) + len(r.measurements.folded) for r in stats.records.values())
    )


# ── counts and sums ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_kinds_are_called_what_summaries_and_metadata_of_clips_call_them():
    kinds = (SPARSE, DENSE_STEP, DENSE_LAYER, FALLBACK, GLOBAL_PATH, SHORT)
    assert kinds == ("sparse", "dense step", "dense layer", "fallback", "global path", "short")
    assert OTHER_REASONS == "other reasons"


def test_pairs_are_batch_times_queries_times_keys_once_for_all_heads():
    stats = CallStats()
    record(stats, 3, CallKind(SPARSE), tensors(5, 7, batch=2, heads=4), density=0.5)
    record(stats, 3, CallKind(SPARSE), tensors(10, 20), density=0.25)
    assert list(stats.records) == [(3, CallKind(SPARSE, "stock", "", False))]
    (found,) = stats.records.values()
    assert (found.calls, found.queries, found.pairs, found.known) == (2, 20, 270, 270)
    assert found.kept == 0.5 * 70 + 0.25 * 200
    assert found.kept_pairs() == (found.kept, 270)
    assert not found.reasons_differ
    assert found.wall > 0


def test_records_are_apart_by_layer_and_by_all_that_a_kind_says():
    stats = CallStats()
    kinds = [CallKind(SPARSE), CallKind(FALLBACK), CallKind(SPARSE, "torch"), CallKind(SPARSE, reason="x")]
    for layer in (0, 1):
        for kind in [*kinds, CallKind(SPARSE, fused=True)]:
            record(stats, layer, kind, tensors(2))
    assert len(stats.records) == 10
    assert {found.calls for found in stats.records.values()} == {1}


def test_a_call_without_a_kind_and_one_that_fails_count_as_nothing():
    stats = CallStats()
    with stats.record(0, None, *tensors(2)):
        pass
    with pytest.raises(RuntimeError, match="out of memory"), stats.record(0, CallKind(SPARSE), *tensors(2)):
        raise RuntimeError("out of memory")
    assert not stats.records


def test_a_kind_may_be_given_first_and_a_call_is_dense_unless_it_says_so():
    stats = CallStats()
    with stats.record(0, CallKind(FALLBACK, reason="why"), *tensors(3)) as call:
        assert call.kind == CallKind(FALLBACK, reason="why")
    (found,) = stats.records.values()
    assert (found.known, found.kept) == (9, 9)


def test_a_captured_call_is_counted_without_time_or_measurements(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stats = CallStats()
    on_gpu = [SimpleNamespace(shape=x.shape, device=torch.device("cuda")) for x in tensors(4)]
    record(stats, 0, CallKind(SPARSE), on_gpu, density=None, values={"density": 0.5})
    (found,) = stats.records.values()
    assert (found.calls, found.pairs, found.known, found.wall) == (1, 16, 0, 0.0)
    assert found.kept_pairs() == (0.0, 0)


# ── measurements of dynamic calls ────────────────────────────────────────────────────────────────────────────────────


def test_measurements_are_weighed_by_pairs_rows_or_not_at_all():
    stats = CallStats()
    kind = CallKind(SPARSE)
    first = {"density": 0.5, "recall": 0.75, "broken": 2.0}
    record(stats, 0, kind, tensors(4), density=None, values=first)
    record(stats, 0, kind, tensors(4), density=None, values=first)
    record(stats, 0, kind, tensors(8, batch=2), None, {"density": 0.25, "recall": 0.5, "probe": 1.0, "broken": 1.0})
    record(stats, 0, kind, tensors(8), density=1.0)  # one whose density is known
    (found,) = stats.records.values()
    assert found.kept_pairs() == (0.5 * 32 + 0.25 * 128 + 64, 32 + 128 + 64)
    assert found.measurements.total("recall") == (0.75 * 8 + 0.5 * 16, 24)
    assert found.measurements.total("probe") == (16.0, 16)
    assert found.measurements.total("broken") == (5.0, 3)
    assert found.measurements.total("nothing") == (0.0, 0)
    # Reading changes nothing, and adding goes on.
    assert found.measurements.total("recall") == (0.75 * 8 + 0.5 * 16, 24)
    record(stats, 0, kind, tensors(4), density=None, values=first)
    assert found.measurements.total("recall") == (0.75 * 12 + 0.5 * 16, 28)


def test_sums_are_kept_in_float64():
    measurements = Measurements()
    measurements.add({"density": torch.tensor(1.0)}, 2**26, 2**13)
    for _ in range(3):
        measurements.add({"density": torch.tensor(2.0**-30)}, 2**26, 2**13)
    assert measurements.total("density") == (2**26 * (1 + 3 * 2.0**-30), 2**28)


def test_adding_does_not_read_the_device(monkeypatch):
    """A float() of a device tensor waits for the device: only totals may."""
    measurements = Measurements()

    def read(self):
        raise AssertionError("a value was read")

    with monkeypatch.context() as patched:
        for name in ("__float__", "item", "tolist", "__bool__"):
            patched.setattr(torch.Tensor, name, read)
        for tokens in range(1, 3 * MAX_SHAPES):
            for _ in range(2):
                measurements.add({"density": torch.tensor(0.5)}, tokens**2, tokens)
        measurements.add({}, 5, 5)
    pairs = 2 * sum(tokens**2 for tokens in range(1, 3 * MAX_SHAPES))
    assert measurements.total("density") == (pairs / 2, pairs)


def test_measurements_hold_few_shapes_whatever_comes():
    measurements, most = Measurements(), 0
    for tokens in range(1, 200):
        measurements.add({"density": torch.tensor(0.5)}, tokens**2, tokens)
        most = max(most, len(measurements.shapes))
    assert most == MAX_SHAPES
    assert list(measurements.folded) == ["density"]


# ── time on a device ─────────────────────────────────────────────────────────────────────────────────────────────────


class Event:
    """A stand-in for a device event at a time in milliseconds; counts how often it is waited for."""

    def __init__(self, at: float, done: bool = True) -> None:
        self.at, self.done, self.waits = at, done, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waits += 1
        self.done = True

    def elapsed_time(self, end: Event) -> float:
        assert end.done, "read before the device was there"
        return end.at - self.at


def pairs_of(count: int, done: int) -> list[tuple[Event, Event]]:
    """Events of calls that took 1, 2, 3, … ms; the first ``done`` calls are over."""
    return [(Event(1000.0 * n, n < done), Event(1000.0 * n + n + 1, n < done)) for n in range(count)]


def test_seconds_are_of_all_events_and_wait_for_the_last():
    found, events = CallRecord(wall=0.5), pairs_of(10, done=10)
    for start, end in events:
        found.add_time(start, end)
    assert found.seconds() == 0.5 + sum(range(1, 11)) / 1e3
    assert [end.waits for _, end in events] == [0] * 9 + [1]
    assert found.events == []
    assert found.seconds() == 0.5 + sum(range(1, 11)) / 1e3
    assert CallRecord().seconds() == 0.0


def test_old_events_are_folded_half_at_a_time_and_in_order():
    found, half = CallRecord(), MAX_EVENTS // 2
    events = pairs_of(MAX_EVENTS, done=half)
    for start, end in events[:-1]:
        found.add_time(start, end)
    assert len(found.events) == MAX_EVENTS - 1
    assert found.wall == 0.0
    found.add_time(*events[-1])
    assert found.events == events[half:]  # those that may still be running stay
    assert found.wall == pytest.approx(sum(range(1, half + 1)) / 1e3)
    assert not any(end.waits for _, end in events)
    for _, end in events[half:]:
        end.done = True
    assert found.seconds() == pytest.approx(sum(range(1, MAX_EVENTS + 1)) / 1e3)


def test_events_that_are_not_over_are_not_waited_for_while_calls_come():
    found, half = CallRecord(), MAX_EVENTS // 2
    events = pairs_of(MAX_EVENTS + 20, done=half - 1)  # the last one of the first half is still running
    for start, end in events:
        found.add_time(start, end)
    assert len(found.events) == MAX_EVENTS + 20
    assert not any(end.waits for _, end in events)
    for _, end in events:
        end.done = True
    found.add_time(Event(0.0), Event(1.0))
    assert len(found.events) == MAX_EVENTS + 21 - half


def test_on_a_gpu_the_stream_of_the_queries_device_is_timed(monkeypatch):
    """Device events around the block and nothing else: two times on the stream, no wall clock."""
    device = torch.device("cuda", 1)
    streams = {device: SimpleNamespace(name="of device 1")}
    clock = iter(range(100))

    class Recorded(Event):
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            super().__init__(-1.0)

        def record(self, stream) -> None:
            assert stream is streams[device]
            self.at = 10.0 * next(clock)

    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda given: streams[given])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    qk = [SimpleNamespace(shape=(1, 3, 2, 4), device=device) for _ in range(2)]
    stats = CallStats()
    for _ in range(3):
        with stats.record(0, CallKind(SPARSE), *qk):
            pass
    (found,) = stats.records.values()
    assert (found.calls, found.pairs, found.wall) == (3, 27, 0.0)
    assert [(start.at, end.at) for start, end in found.events] == [(0, 10), (20, 30), (40, 50)]
    assert found.seconds() == 0.03
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with stats.record(0, CallKind(SPARSE), *qk):
        pass
    assert (found.calls, found.events, found.wall) == (4, [], 0.03)


# ── a bounded size ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_sizes_and_densities_take_no_more_room_and_add_up():
    stats, sizes, kept, pairs = CallStats(), set(), 0.0, 0
    for n in range(600):
        tokens, density = 100 + 7 * n, 1 / (1 + n % 97)
        for layer in range(2):
            record(stats, layer, CallKind(SPARSE), tensors(tokens), density)
            reason = f"{tokens} queries and {tokens + n} keys are not the {tokens - 1} tokens of the grid 1×{n}×9"
            record(stats, layer, CallKind(FALLBACK, reason=reason), tensors(tokens))
            values = {"density": density, "recall": 0.5}
            record(stats, layer, CallKind(SPARSE, "triton"), tensors(tokens), None, values)
        kept, pairs = kept + density * tokens**2, pairs + tokens**2
        sizes.add(size_of(stats))
    assert len(stats.records) == 2 * 3
    assert max(sizes) <= 2 * (3 + 1 + MAX_SHAPES + 2)
    for layer in range(2):
        sparse = stats.records[layer, CallKind(SPARSE)]
        assert (sparse.calls, sparse.pairs) == (600, pairs)
        assert sparse.kept == pytest.approx(kept, rel=1e-12)
        dynamic = stats.records[layer, CallKind(SPARSE, "triton")]
        assert dynamic.kept_pairs() == (pytest.approx(kept, rel=1e-6), pairs)
        (fallback,) = [found for (n, kind), found in stats.records.items() if (n, kind.kind) == (layer, FALLBACK)]
        assert (fallback.calls, fallback.pairs, fallback.kept) == (600, pairs, pairs)


def test_reasons_that_differ_in_numbers_count_together_under_the_first():
    stats = CallStats()
    for reason in ("7 keys", "7 keys", "7 queries"):
        record(stats, 0, CallKind(FALLBACK, reason=reason), tensors(2))
    assert [record.reasons_differ for record in stats.records.values()] == [False, False]
    record(stats, 0, CallKind(FALLBACK, reason="81 keys"), tensors(2))
    record(stats, 0, CallKind(FALLBACK, reason="7 keys"), tensors(2))
    record(stats, 1, CallKind(FALLBACK, reason="9 keys"), tensors(2))
    found = [(n, kind.reason, record.calls, record.reasons_differ) for (n, kind), record in stats.records.items()]
    assert found == [(0, "7 keys", 4, True), (0, "7 queries", 1, False), (1, "9 keys", 1, False)]


def test_no_more_than_so_many_reasons_a_layer_and_the_rest_are_counted():
    stats = CallStats()
    words = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(40)]
    for _ in range(3):
        for word in words:
            for layer in range(2):
                record(stats, layer, CallKind(FALLBACK, reason=f"because of {word}"), tensors(2))
    assert len(stats.records) == 2 * (MAX_REASONS + 1)
    for layer in range(2):
        found = {kind.reason: record.calls for (n, kind), record in stats.records.items() if n == layer}
        assert found == {f"because of {w}": 3 for w in words[:MAX_REASONS]} | {
            OTHER_REASONS: 3 * (len(words) - MAX_REASONS)
        }
    assert all(re.search("because|other", kind.reason) for _, kind in stats.records)
