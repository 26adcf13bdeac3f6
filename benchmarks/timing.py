"""Timing: medians of many runs, spread shown; device events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 1 << 28  # written between runs, so that no run finds its inputs in the cache


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    low: float
    high: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        return {"ms": self.median, "ms_min": self.low, "ms_max": self.high, "runs": self.runs}


def measure(run: Callable[[], object], device: torch.device, *, seconds: float = 1.0, warmup: int = 3) -> Timing:
    """Time ``run`` repeatedly for about ``seconds``, at least 5 times, after ``warmup`` uncounted runs."""
    on_gpu = device.type == "cuda"
    for _ in range(warmup):
        run()
    times: list[float] = []
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if on_gpu else None
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
        if flush is not None:
            flush.zero_()
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
    return Timing(statistics.median(times), min(times), max(times), len(times))
