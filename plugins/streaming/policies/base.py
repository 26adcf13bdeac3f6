"""What a cache policy is, and the registry. A new policy is one function in a file of its own in this folder.

    @register("ema", averages=True)
    def ema(kept: Kept, event: Event) -> None: …

It is called for all layers and lanes at once, at most twice a chunk: before it, when frames leave the ring, and after it, when it
is finished. It changes ``kept`` and must not wait for the device.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import tilewise.plugins.streaming.policies
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.streaming.buffers import Frames
from tilewise.plugins.streaming.kv_cache import KVCache


@dataclass
class Kept:
    """The frames that a cache keeps; a policy puts others in their place.

    sink: S frames; None before the stream had as many. memory: M frames; None until a policy fills it.
    """

    sink: Frames | None
    memory: Frames | None


@dataclass(frozen=True)
class Event:
    """What happened to a cache.

    Attributes:
        kind: "evicted": ``frames`` are about to leave the ring, oldest first. "committed": ``frames`` are a finished chunk.
        frames: keys and values, not turned with time.
        first_of_shot: the chunk is the first one after ``CausalDenoiser.new_shot``.
    """

    kind: str
    frames: Frames
    first_of_shot: bool = False


@dataclass(frozen=True)
class Policy:
    """A policy and what it asks for.

    Attributes:
        update: the function. events: the kinds that it is called for.
        averages: sink and memory change little by little, so that their masters keep keys and values whole in float32.
        memory: frames of memory for a chunk of c and a sink of S.
        whole_chunks: the sink must have as many frames as a chunk.
        needs_sink: the sink must have at least one frame.
        ahead: the sink stands after the chunk under way instead of before the ring.
    """

    name: str
    update: Callable[[Kept, Event], None] | None
    events: tuple[str, ...] = ()
    averages: bool = False
    memory: Callable[[int, int], int] = lambda chunk, sink: 0
    whole_chunks: bool = False
    needs_sink: bool = True
    ahead: bool = False

    def check(self, options: KVCache, chunk: int) -> None:
        """Refuse options that do not fit the policy.

        Raises:
            ConfigError: saying what would fit.
        """
        if self.needs_sink and not options.sink:
            raise ConfigError(f"KVCache: the policy {self.name!r} needs a sink; give sink= at least 1 latent frame")
        if self.whole_chunks and options.sink != chunk:
            raise ConfigError(
                f"KVCache: the policy {self.name!r} needs a sink as long as a chunk, {chunk} latent frames; got {options.sink}"
            )
        wanted = self.memory(chunk, options.sink)
        if options.memory is not None and options.memory != wanted:
            raise ConfigError(
                f"KVCache: the policy {self.name!r} keeps {wanted} latent frames of memory here; got memory={options.memory}"
            )


_REGISTRY: dict[str, Policy] = {}


def register(name: str, **asked: object) -> Callable[[Callable[[Kept, Event], None]], Callable[[Kept, Event], None]]:
    """Decorator: makes a function known as a policy. asked: fields of ``Policy``."""

    def add(update: Callable[[Kept, Event], None]) -> Callable[[Kept, Event], None]:
        _REGISTRY[name] = Policy(name, update, **asked)  # type: ignore[arg-type]
        return update

    return add


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(tilewise.plugins.streaming.policies.__path__):
        importlib.import_module(f"tilewise.plugins.streaming.policies.{module.name}")


def policies() -> list[str]:
    """Names of all policies."""
    _import_all()
    return sorted(_REGISTRY)


def policy(name: str) -> Policy:
    """A policy by its name.

    Raises:
        ConfigError: there is none of that name; the message lists those that there are.
    """
    _import_all()
    if name not in _REGISTRY:
        raise unknown("cache policy", name, _REGISTRY)
    return _REGISTRY[name]
