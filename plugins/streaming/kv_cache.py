"""What a KV cache keeps: how many latent frames, which policy, at which positions, and how much memory that takes.

The window of a chunk of c latent frames, W in all, in the order in which a layer's buffer has them:

    | memory M | sink S | ring W − S − c | current c |

The ring holds the last frames before the chunk, the sink the first ones of the stream (StreamingLLM, arXiv 2309.17453, §3.2).
The memory is what a policy makes of frames that leave the ring; it comes on top of the window. Softmax does not mind the order of
keys, so frames that come take the place of those that leave, and nothing is shifted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from tilewise.plugins.errors import ConfigError

SINK_POSITIONS = ("clamped", "absolute")


@dataclass(frozen=True)
class KVCache:
    """Options of a stream's KV cache. Lengths are in latent frames.

    Args:
        window: frames that a chunk attends to, the sink and the chunk itself included.
        sink: how many of them are the first frames of the stream, which never leave.
        memory: frames beside the window that the policy fills; None: as many as the policy asks for.
        sink_position: "clamped": memory and sink stand just before the oldest frame of the ring, wherever that is
            (LongLive-infinity, Reward Forcing). "absolute": at their own positions, further back with every chunk
            (LongLive, arXiv 2509.22622).
        policy: what becomes of frames that leave; a name of ``policies()``.

    Raises:
        ConfigError: for lengths or names that cannot be.
    """

    window: int = 21
    sink: int = 0
    memory: int | None = None
    sink_position: str = "clamped"
    policy: str = "fixed"

    def __post_init__(self) -> None:
        for name in ("window", "sink", "memory"):
            value = getattr(self, name)
            least = 1 if name == "window" else 0
            if value is None and name == "memory":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"KVCache: {name} must be a whole number of at least {least} latent frames, got {value!r}"
                )
        if self.sink >= self.window:
            raise ConfigError(
                f"KVCache: a sink of {self.sink} latent frames leaves no room in a window of {self.window}; make the window "
                "larger, or the sink smaller"
            )
        if self.sink_position not in SINK_POSITIONS:
            raise ConfigError(
                f"KVCache: sink_position must be one of {', '.join(SINK_POSITIONS)}, got {self.sink_position!r}"
            )

    def check_chunk(self, chunk: int) -> None:
        """Refuse a chunk of so many latent frames, if the window has no room for it.

        Raises:
            ConfigError: saying what would fit.
        """
        if chunk < 1:
            raise ConfigError(f"KVCache: a chunk must have at least 1 latent frame, got {chunk}")
        if chunk > self.window - self.sink:
            raise ConfigError(
                f"KVCache: a chunk of {chunk} latent frames does not fit in a window of {self.window} with a sink of "
                f"{self.sink}; the window must be at least {chunk + self.sink}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


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

    def bytes_per_frame(self) -> int:
        """Keys and values of one latent frame, all layers and lanes."""
        return 2 * self._rows * self.heads * self.head_dim * self.dtype.itemsize

    def bytes_per_kept_frame(self, averages: bool) -> int:
        """The un-rotated master of one frame of the sink or memory, which comes on top. averages: with keys and values whole."""
        channels = 2 * self.head_dim if averages else self.time_channels
        return self._rows * self.heads * channels * self.master_dtype.itemsize

    @property
    def _rows(self) -> int:
        return self.layers * self.lanes * self.batch * self.tokens
