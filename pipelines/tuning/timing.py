"""Timing: medians of many runs, spread shown; device events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 1 << 28  # written between runs, so that no run finds its inputs in the cache (an H200 has 60 MB of it)
FLUSHES = (
    8  # about half a millisecond of work on the GPU, behind which the launch of what is timed hides, as in real use
)
LEAST, MOST = 3, 200
LONG = 1000.0  # ms: dense attention over 680 000 tokens takes seconds a call; two timed runs must do


@dataclass(frozen=True)
class Timing:
    """Milliseconds. spread: how far runs differ, (9th − 1st decile) ÷ median."""

    median: float
    low: float
    high: float
    runs: int
    spread: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return {"ms": self.median, "ms_min": self.low, "ms_max": self.high, "runs": self.runs}


def measure(
    run: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = 1.0,
    warmup: int = 1,
    flush: bool = True,
) -> Timing:
    """Time ``run`` repeatedly for about ``seconds``, after ``warmup`` uncounted runs: at least 3 times, 2 if a run is long.

    Args:
        flush: overwrite the L2 cache before each run. Off for whole models, whose memory use is measured too.
    """
    on_gpu = device.type == "cuda"
    for _ in range(warmup):
        run()
    times: list[float] = []
    filler = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if on_gpu and flush else None
    begin = time.perf_counter()
    while len(times) < (LEAST if not times or times[0] < LONG else 2) or (
        time.perf_counter() - begin < seconds and len(times) < MOST
    ):
        if on_gpu:
            if filler is not None:
                for _ in range(FLUSHES):
                    filler.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            run()
            times.append((time.perf_counter() - before) * 1e3)
    times.sort()
    tenth, median = len(times) // 10, statistics.median(times)
    spread = (times[-1 - tenth] - times[tenth]) / median if median else 0.0
    return Timing(median, times[0], times[-1], len(times), spread)
