"""Distribute jobs over the processes that torchrun, `accelerate launch` or a similar launcher starts.

Each of them sets RANK, WORLD_SIZE and LOCAL_RANK in the environment, and nothing else is needed: a clip is made by one
process, so that the processes never talk to each other and none waits for one that has died.

Ownership: longest job first, each to the process with the least work so far (Graham 1969, "Bounds on multiprocessing timing
anomalies"): at most 4/3 of the best possible time. It depends on the jobs alone, not on what is done already, so that
processes that start at different moments agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.parallel.world import World


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
