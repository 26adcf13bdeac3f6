"""``ema``: frames that leave are folded into the sink (Reward Forcing, arXiv 2512.04678, "EMA-Sink").

    sink ← α · sink + (1 − α) · evicted,    α = 0.999

for keys before rotation and for values, frame by frame: the sink has as many frames as a chunk.
"""

from __future__ import annotations

from tilewise.plugins.streaming.policies.base import Event, Kept, register

ALPHA = 0.999


@register("ema", events=("evicted",), averages=True, whole_chunks=True)
def ema(kept: Kept, event: Event) -> None:
    if kept.sink is None:
        return
    # A chunk of another length than the sink's (the first one may be) folds the frames that it has.
    frames = slice(min(len(event.frames), len(kept.sink)))
    sink, evicted = kept.sink.take(frames), event.frames.take(frames)
    sink.key.lerp_(evicted.key, 1 - ALPHA)
    sink.value.lerp_(evicted.value, 1 - ALPHA)
