"""The sizes of a KV cache, known before anything runs; the buffers are made by them.

window    (memory + window) frames of keys and values in the model's dtype, all layers and lanes; or in 8 bits with scales, and
          those of one layer in the model's dtype, while it runs
masters   (memory + sink) frames of keys that are not turned with time, float32; with the policy's averages, of whole keys and
          values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.models.common.rotary import Rotary
from tilewise.plugins.streaming.kv_cache import KVCache

# Where a policy changes what is kept, frames are copied in float32 on the way: for each that takes part, so many times its keys
# at the peak. Counted on a CPU: 2 with "ema", 2.5 with "fixed", 3.5 with "adaptive".
COPIES = 3.5
SCALES = 3  # bytes of scales in 8 bits: two of a row of a key, one of a value


@dataclass(frozen=True)
class CacheShape:
    """The sizes that decide how much memory a cache takes.

    Attributes:
        layers: self-attention layers. lanes: forwards of a step that each have keys of their own (conditional and
            unconditional: 2). batch: samples.
        tokens: of a latent frame. heads, head_dim: of keys. time_channels: see ``Rotary``.
        dtype: of keys and values.
    """

    layers: int
    lanes: int
    batch: int
    tokens: int
    heads: int
    head_dim: int
    time_channels: int
    dtype: torch.dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Of un-rotated keys, from which kept ones are rotated anew."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def rows(self) -> int:
        """Vectors of ``head_dim`` numbers in the keys of one latent frame, all layers and lanes."""
        return self.layers * self.lanes * self.batch * self.tokens * self.heads


@dataclass(frozen=True)
class CachePlan:
    """Sizes of the cache of one denoiser. Lengths are in latent frames, memory in bytes.

    Attributes:
        shape: of a latent frame.
        window, sink: see ``KVCache``. memory: of the policy.
        averages: the policy changes sink and memory little by little, so that their masters have keys and values whole.
        storage: see ``KVCache``.
    """

    shape: CacheShape
    window: int
    sink: int
    memory: int
    averages: bool
    storage: str = "model"

    @property
    def latent(self) -> int:
        """Keys and values of one latent frame, all layers and lanes."""
        if self.storage == "fp8":
            return self.shape.rows * (2 * self.shape.head_dim + SCALES)
        return 2 * self.shape.rows * self.shape.head_dim * self.shape.dtype.itemsize

    @property
    def frames(self) -> int:
        """All keys and values: memory and window."""
        return (self.memory + self.window) * self.latent

    @property
    def one_layer(self) -> int:
        """Keys and values of one layer and lane in the model's dtype, where they are stored in another."""
        shape = self.shape
        rows = (self.memory + self.window) * shape.rows // (shape.layers * shape.lanes)
        return 2 * rows * shape.head_dim * shape.dtype.itemsize if self.storage == "fp8" else 0

    @property
    def masters(self) -> int:
        """What memory and sink are turned from."""
        channels = 2 * self.shape.head_dim if self.averages else self.shape.time_channels
        return (self.memory + self.sink) * self.shape.rows * channels * self.shape.master_dtype.itemsize

    @property
    def total(self) -> int:
        """What the buffers take on the device."""
        return self.frames + self.one_layer + self.masters

    def between_chunks(self, chunk: int, events: Sequence[str]) -> int:
        """About what is copied for a moment where frames become part of what is kept. events: of the policy."""
        keys = self.shape.rows * self.shape.head_dim * self.shape.master_dtype.itemsize
        frames = chunk + self.memory + self.sink if events else min(chunk, self.sink)
        return int(COPIES * keys * frames)

    def to_dict(self) -> dict[str, int]:
        """Bytes."""
        names = ("latent", "frames", "one_layer", "masters", "total")
        return {name: getattr(self, name) for name in names}


def plan_cache(
    layers: Sequence[Any],
    rotary: Rotary,
    cache: KVCache,
    grid: Grid,
    *,
    memory: int,
    averages: bool,
    lanes: int,
    batch: int,
    dtype: torch.dtype,
) -> CachePlan:
    """The sizes for a denoiser's self-attention layers. grid: of a chunk. memory, averages: of the policy. dtype: of keys."""
    first = layers[0]
    shape = CacheShape(
        layers=len(layers), lanes=lanes, batch=batch, tokens=grid.h * grid.w, heads=first.heads, head_dim=first.head_dim,
        time_channels=rotary.time_channels, dtype=dtype,
    )  # fmt: skip
    return CachePlan(shape, cache.window, cache.sink, memory, averages, cache.storage)
