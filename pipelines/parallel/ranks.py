"""The processes that make one clip together.

What can be wrong is looked for in all of them before any begins: one that fails makes the others end too, and one whose version
or request differs is found. Once they exchange tensors, a process that dies leaves the others waiting for it: the launcher ends
those, which only works at once while signals have their default effect, as nobody handles them in the middle of an exchange.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.parallel.world import World
from tilewise.plugins.context_parallel.enable import enable_context_parallel
from tilewise.plugins.context_parallel.enable_cfg import enable_cfg_parallel
from tilewise.plugins.context_parallel.ways import CFG, token_parts
from tilewise.plugins.errors import ConfigError, TilewiseError

T = TypeVar("T")


class OtherRankError(TilewiseError):
    """Another process failed and says why; this one only ends."""


class Ranks:
    """This process among those that make a clip; one alone where there are no others."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def count(self) -> int:
        return self.world.size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.world.rank == 0

    def all(self, value: Any) -> list[Any]:
        """What each process gives, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, if it returns in all processes. Not for work in which they exchange tensors.

        Raises what it raises in the first process where it fails, and OtherRankError in the others.
        """
        failed: Exception | None = None
        value: Any = None
        try:
            value = work()
        except Exception as error:
            failed = error
        who = [rank for rank, failing in enumerate(self.all(failed is not None)) if failing]
        if not who:
            return value
        if failed is not None and self.world.rank == who[0]:
            raise failed
        raise OtherRankError(f"process {who[0]} of {self.count} failed")

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises ConfigError, in the first process, where others have other facts: versions, settings, devices."""
        each = self.all(dict(facts))
        if different := [name for name in each[0] if any(other.get(name) != each[0][name] for other in each)]:
            name = different[0]
            said = "; ".join(f"process {rank}: {str(other.get(name))[:200]}" for rank, other in enumerate(each))
            if not self.first:
                raise OtherRankError("the processes differ")
            raise ConfigError(
                f"the processes that make one clip differ in {', '.join(different)} ({said}). Start all of them with the same "
                "command, libraries and kind of GPU"
            )

    def parts(self, way: str) -> int:
        """Over how many processes the tokens of a forward are split. way: see ``WAYS``."""
        return token_parts(self.count, way)

    def split(self, pipe: Any, way: str) -> None:
        """Divide the work of a pipeline's denoisers between the processes, if there are several. way: see ``WAYS``."""
        if self.count > 1:
            self.together(lambda: (enable_cfg_parallel if way == CFG else enable_context_parallel)(pipe))

    def lost(self, error: BaseException) -> TilewiseError | None:
        """What to raise for an exchange that failed as another process is gone; None for any other error."""
        if not isinstance(error, RuntimeError) or not re.search("(?i)gloo|nccl", str(error)):
            return None
        kind = TilewiseError if self.first else OtherRankError
        return kind(
            f"another of the {self.count} processes ended in the middle of an exchange: its own message, or that of "
            f"torchrun, says why ({str(error).splitlines()[0][:160]})"
        )

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """For a block in which the processes exchange tensors: signals end this one at once. In the first, Ctrl-C raises.

        Raises TilewiseError where an exchange fails as another process is gone.
        """
        if self.count == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        ending = [signal.SIGTERM] if self.first else [signal.SIGTERM, signal.SIGINT]
        before = {which: signal.signal(which, signal.SIG_DFL) for which in ending}
        try:
            yield
        except RuntimeError as error:
            if (lost := self.lost(error)) is None:
                raise
            raise lost from error
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


@contextlib.contextmanager
def joined(world: World, device: str) -> Iterator[Ranks]:
    """For a block in which the processes of ``world`` make one clip: with a process group, and each on its device.

    Raises ConfigError for a device that only one of them can have, or without what a launcher says.
    """
    if world.size == 1:
        yield Ranks(world)
        return
    if ":" in device:
        raise ConfigError(f"--device {device} names one GPU, and {world.size} processes need one each: leave it out")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world.size} is in the environment, but not {', '.join(missing)}: start it with torchrun "
            f"--nproc-per-node {world.size} -m tilewise …, or unset WORLD_SIZE"
        )
    where = resolve_device(world.device(device))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # Objects go over the CPU, where nothing waits for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield Ranks(world)
    finally:
        dist.destroy_process_group()
