"""What a launcher, torchrun, `accelerate launch` or a similar one, says in the environment of each process that it starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

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
