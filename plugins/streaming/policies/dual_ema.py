"""``dual_ema``: a long and a short average of all that left, beside a fixed sink (MemRoPE).

    long  ← 0.99 · long  + 0.01 · evicted
    short ← 0.9  · short + 0.1  · evicted

for keys before rotation and for values, frame by frame, each as long as a chunk. The first chunk that leaves begins both.
"""

from __future__ import annotations

import torch

from tilewise.plugins.streaming.buffers import Frames
from tilewise.plugins.streaming.policies.base import Event, Kept, register

RATES = (0.01, 0.1)


@register("dual_ema", events=("evicted",), averages=True, memory=lambda chunk, sink: 2 * chunk, needs_sink=False)
def dual_ema(kept: Kept, event: Event) -> None:
    new = event.frames
    if kept.memory is None:
        kept.memory = Frames(torch.cat([new.key, new.key], 3), torch.cat([new.value, new.value], 3))
        return
    for number, rate in enumerate(RATES):
        length = len(kept.memory) // 2
        frames = min(length, len(new))
        average = kept.memory.take(slice(number * length, number * length + frames))
        average.key.lerp_(new.take(slice(frames)).key, rate)
        average.value.lerp_(new.take(slice(frames)).value, rate)
