"""``shot``: the first frames of the newest shot are the sink (LongLive 2.0). A shot begins with ``CausalDenoiser.new_shot``."""

from __future__ import annotations

from tilewise.plugins.streaming.policies.base import Event, Kept, register


@register("shot", events=("committed",))
def shot(kept: Kept, event: Event) -> None:
    if kept.sink is None or not event.first_of_shot:
        return
    frames = slice(min(len(event.frames), len(kept.sink)))
    new = event.frames.take(frames)
    kept.sink.take(frames).key.copy_(new.key)
    kept.sink.take(frames).value.copy_(new.value)
