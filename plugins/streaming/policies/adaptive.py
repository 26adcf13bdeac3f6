"""``adaptive``: a frame of the sink that has little in common with the newest chunk is replaced (StreamDiffusionV2).

    cos_i = least over layers of  cos(mean of the sink's keys of frame i, mean of the chunk's keys of its frame i mod c)
    sink_i ← chunk_(i mod c)  where cos_i < 0.2

Means are over tokens; the cosine is over all channels of all heads, before rotation. The choice is made on the device. Where a
sparse method stores chunks in tile order, a "frame" here is as many of its rows.
"""

from __future__ import annotations

import torch

from tilewise.plugins.streaming.policies.base import Event, Kept, register

THRESHOLD = 0.2


@register("adaptive", events=("committed",))
def adaptive(kept: Kept, event: Event) -> None:
    if kept.sink is None:
        return
    at = [frame % len(event.frames) for frame in range(len(kept.sink))]
    key, value = event.frames.key[:, :, :, at], event.frames.value[:, :, :, at]

    def mean(keys: torch.Tensor) -> torch.Tensor:
        return keys.mean(4).flatten(-2)  # (lanes, layers, B, frames, H · D)

    alike = torch.cosine_similarity(mean(kept.sink.key), mean(key), dim=-1).amin(1, keepdim=True)
    stale = (alike < THRESHOLD)[..., None, None, None]
    kept.sink.key.copy_(torch.where(stale, key, kept.sink.key))
    kept.sink.value.copy_(torch.where(stale, value, kept.sink.value))
