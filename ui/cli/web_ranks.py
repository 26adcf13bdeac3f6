"""`tilewise ui` started by torchrun: the first process serves the page, and all make its clips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.parallel.checks import check_way_for, machine_facts
from tilewise.pipelines.parallel.ranks import joined
from tilewise.pipelines.parallel.world import World
from tilewise.ui.cli.progress import quiet_libraries
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.shared_clips import SharedClips


@contextlib.contextmanager
def shared_clips(world: World, names: Sequence[str], device: str, dtype: str, way: str) -> Iterator[SharedClips | None]:
    """For the process that serves the page, what it makes clips by. The others follow it here, and get None when it ends.

    Raises ConfigError where the processes differ, or cannot divide clips in this way.
    """
    with joined(world, device) as ranks:
        check_way_for(way, ranks)
        own = world.device(device)
        ranks.agree({**machine_facts(resolve_device(own), dtype, way), "models": list(names)})
        shared = SharedClips(ranks, way)
        if ranks.first:
            yield shared
            return
        with quiet_libraries(), ranks.exchanging():
            shared.follow(Models(names, own, dtype, shared=shared))
        yield None
