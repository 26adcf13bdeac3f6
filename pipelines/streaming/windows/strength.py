"""Windows that begin from a video: the pipeline's own schedule, from the noise level on that is nearest to a strength."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tilewise.pipelines.streaming.windows.noise import is_diffusion, level_after
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute


class _AskedError(Exception):
    """Ends a call that has told its schedule."""


def schedule_of(pipe: Any, call: Callable[[], Any]) -> list[float]:
    """Noise levels σ_0 > … > σ_n = 0 of the schedule that a call of a pipeline asks for. The call is broken off there."""
    whole = pipe.scheduler.set_timesteps

    @functools.wraps(whole)  # pipelines look at the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        raise _AskedError

    with temporary_attribute(pipe.scheduler, "set_timesteps", set_timesteps), contextlib.suppress(_AskedError):
        call()
    return [level_after(pipe.scheduler, step) for step in range(len(pipe.scheduler.timesteps) + 1)]


def first_pass(levels: list[float], strength: float) -> int:
    """Number of the pass whose noise level is nearest to a strength, 0 … 1; that of the passes, where it is nearest to 0."""
    return min(range(len(levels)), key=lambda step: abs(levels[step] - strength))


@contextlib.contextmanager
def begun_at(pipe: Any, first: int) -> Iterator[None]:
    """Run a block in which the pipeline's schedules begin with their pass number ``first``."""
    scheduler = pipe.scheduler
    whole = scheduler.set_timesteps

    @functools.wraps(whole)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[first:]
        if not is_diffusion(scheduler):  # whose steps are as long as the whole schedule has them
            scheduler.sigmas = scheduler.sigmas[first:]
            scheduler.num_inference_steps = len(scheduler.timesteps)

    with temporary_attribute(scheduler, "set_timesteps", set_timesteps):
        yield
