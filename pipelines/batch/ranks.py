"""Distribute jobs over the processes that torchrun, `accelerate launch` or a similar launcher starts.

Each of them sets RANK, WORLD_SIZE and LOCAL_RANK in the environment, and nothing else is needed: a clip is made by one
process, so that the processes never talk to each other and none waits for one that has died.

Ownership: longest job first, each to the process with the least work so far (Graham 1969, "Bounds on multiprocessing timing
anomalies"): at most 4/3 of the best possible time. It depends on the jobs alone, not on what is done already, so that
processes that start at different moments agree.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from tilewise.pipelines.batch.job import Job
from tilewise.plugins.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class World:
    """rank: of this process, from 0. size: number of processes. local_rank: of this process on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self, device: str) -> str:
        """The device for this process: with several, "auto" and "cuda" mean the GPU that the launcher gives it."""
        import torch

        if self.size == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{self.local_rank}"


def world_from_environment(environment: Mapping[str, str] | None = None) -> World:
    """The world that a launcher describes; one process alone if there is none. Raises ConfigError for what cannot be."""
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" not in given:
        return World()
    rank, size = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    local_rank = _number(given, "LOCAL_RANK") if "LOCAL_RANK" in given else rank
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={size} in the environment: RANK must be in 0 to WORLD_SIZE - 1")
    return World(rank, size, local_rank)


def owned(jobs: Sequence[Job], world: World) -> list[Job]:
    """The jobs of this process, in their order."""
    load = [0.0] * world.size
    mine: list[Job] = []
    for job in sorted(jobs, key=lambda job: (-job.flop, job.index)):
        owner = load.index(min(load))
        load[owner] += job.flop
        if owner == world.rank:
            mine.append(job)
    return sorted(mine, key=lambda job: job.index)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        value = int(environment[name])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is in the environment, so {name} must be there as well and be a whole number; start with torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        ) from error
    if value < 0:
        raise ConfigError(f"{name}={value} in the environment is below 0")
    return value
