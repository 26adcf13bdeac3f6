"""What a KV cache keeps: how many latent frames, which policy, and at which positions.

The window of a chunk of c latent frames, W in all, in the order in which a layer's buffer has them:

    | memory M | sink S | ring W − S − c | current c |

The ring holds the last frames before the chunk, the sink the first ones of the stream (StreamingLLM, arXiv 2309.17453, §3.2).
The memory is what a policy makes of frames that leave the ring; it comes on top of the window. Softmax does not mind the order of
keys, so frames that come take the place of those that leave, and nothing is shifted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tilewise.plugins.errors import ConfigError

SINK_POSITIONS = ("clamped", "absolute")
STORAGES = ("model", "fp8")


STEP_CACHE_REFUSED = (
    "a stream takes no step cache: each forward writes keys and values of its chunk into the KV cache, and blocks that a step "
    "cache skips would leave old ones there. Leave cache= out"
)
ADD_REFUSED = (
    "a stream over a KV cache takes no addition to the model: what it changes in a forward, the chunks in the cache would not "
    "have. Leave add= out"
)
KEEP_REFUSED = (
    "a stream over a KV cache takes no keep: its sink keeps the first latent frames in the window. Give a sink"
)


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
        storage: "model": keys and values in the model's dtype. "fp8": in 8 bits with scales, about half of bfloat16's memory; see
            ``storage.py``. A chunk's own are seen as they are, those of frames before it in 8 bits.

    Raises:
        ConfigError: for lengths or names that cannot be.
    """

    window: int = 21
    sink: int = 0
    memory: int | None = None
    sink_position: str = "clamped"
    policy: str = "fixed"
    storage: str = "model"

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
        for name, known in (("sink_position", SINK_POSITIONS), ("storage", STORAGES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"KVCache: {name} must be one of {', '.join(known)}, got {value!r}")

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
