"""Where in the denoising schedule a forward is: the run that calls it says so, not the pipeline that was patched.

A denoiser may be shared by pipelines, each with a scheduler of its own; a pipeline may be made after the patch (``X.from_pipe``)
and the patched one may be gone; a cancelled run leaves its scheduler where it stopped. So the pipeline is looked up anew at every
forward, among the callers: the innermost frame that is a method of a diffusers pipeline which holds this denoiser. It is the only
thing that tells which of several pipelines is running: what they leave on their schedulers looks the same, and a pipeline made
later is in no registry. Compiled code is called from that frame too. A loop that is not a pipeline's has no such frame; then the
pipeline that was patched counts.

The step is found in this order. Only the last two read a value of the device, which waits for a GPU:

    1. memory     ``for t in scheduler.timesteps`` gives views, and ``expand`` keeps them: the offset of t is the step
    2. pipeline   the same, of the t that most pipelines note down as ``pipe._current_timestep``
    3. scheduler  ``scheduler.step_index``, which counts the calls of ``scheduler.step``; before the first, ``begin_index``
    4. pipeline   before the first step, where it says how many of the timesteps it runs (video-to-video leaves out the first)
    5. value      the timestep's value among ``scheduler.timesteps``, which are copied to the host once a run
    6. noise      the timestep's value ÷ 1000: a bare denoiser, and a scheduler whose run is over

Solvers of higher order call the denoiser several times between two noise levels and have a timestep for each call (Heun: 2n − 1
of n): each counts as a step here.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from tilewise.plugins.diffusers_compat import current_timestep, timesteps_to_run
from tilewise.plugins.torch_compat import uncompiled

# Resolution of a schedule position that is read off a timestep's value.
FINE = 1000
# A timestep may have been rounded to bfloat16 on its way to the denoiser: 8 significant bits.
ROUNDING = 2.0**-8


class Position(NamedTuple):
    """Where a forward is: step ``step`` of ``total``, counted from 0 over the whole schedule."""

    step: int
    total: int
    is_last: bool = False  # whether no later step follows in this run
    run: Any = None  # the run's timesteps: another run has another object. None: unknown
    first: int = 0  # the first step of the run: later ones where it begins part-way, as image-to-image does
    steps: int = 0  # how many the run has


class _Run(threading.local):
    """The run that a thread's last forward was in: its timesteps, the first step of it, and its timesteps on the host.

    timesteps: a weak reference, as what dynamic methods keep of a run is freed with the run's timesteps (``step_memory.py``).
    """

    def __init__(self) -> None:
        self.timesteps: Callable[[], Any] = lambda: None
        self.first = 0
        self.values: list[float] | None = None


class StepIndex:
    """Tells where a denoiser's forwards are.

    Args:
        pipe: gives the pipeline that was patched, or None.
        denoiser: the module that was patched.
    """

    def __init__(self, pipe: Callable[[], Any], denoiser: nn.Module) -> None:
        self.pipe = pipe
        self._denoiser = weakref.ref(denoiser)
        self._run = _Run()
        self._told = False  # whether it has been said that a step could not be found

    def of(self, timestep: torch.Tensor) -> Position:
        """Where the forward that has just begun is. timestep: as it was given to the denoiser, any shape."""
        running = self._calling()
        pipe = self.pipe() if running is None else running
        scheduler: Any = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
            return by_noise_level(timestep)
        run = self._run
        new = timesteps is not run.timesteps()
        if new:
            run.timesteps, run.values = weakref.ref(timesteps), None
        step = self._step(timestep, timesteps, scheduler, running)
        if step is None:
            run.timesteps = lambda: None
            if running is not None and not self._told:
                self._told = True
                warnings.warn(
                    f"{type(running).__name__}: the timestep of a forward is not among those of its "
                    f"{type(scheduler).__name__}. Its noise level, timestep ÷ 1000, stands in for the step",
                    stacklevel=2,
                )
            return by_noise_level(timestep)
        if new:
            run.first = step
        # How many of the timesteps the pipeline runs, where it says so: denoising may end before they do (SDXL's denoising_end).
        count = min(timesteps_to_run(running) or len(timesteps), len(timesteps) - run.first)
        return Position(
            step, len(timesteps), step + 1 in (len(timesteps), run.first + count), timesteps, run.first, count
        )

    def timestep_at(self, at: Position, timestep: torch.Tensor) -> float:
        """The timestep at a position that ``of`` gave for ``timestep``, as the scheduler counts; may wait for the device."""
        return float(timestep.max()) if at.run is None else self._on_host(at.run)[at.step]

    def _calling(self) -> Any:
        """The pipeline that is calling the denoiser in this thread, or None."""
        denoiser = self._denoiser()
        return None if denoiser is None else running_pipeline(denoiser)

    def pipeline(self) -> Any:
        """The pipeline that is calling the denoiser in this thread, or else the one that was patched, or None."""
        running = self._calling()
        return self.pipe() if running is None else running

    def argument(self, name: str) -> Any:
        """What the pipeline that is calling the denoiser in this thread was given as an argument of its call; None: nothing."""
        denoiser = self._denoiser()
        return None if denoiser is None else argument_of_run(denoiser, name)

    def noise(self, timestep: torch.Tensor) -> float:
        """The noise level of the forward that has just begun, from 1 (noise alone) to 0: its timestep ÷ those of training.

        Timesteps are read from the device once a run.
        """
        found = self.of(timestep)
        if found.run is None:
            return 1 - found.step / found.total
        trained = getattr(self.pipeline().scheduler.config, "num_train_timesteps", None) or FINE
        values = self._on_host(found.run)
        level = min(max(values[found.step] / trained, 0.0), 1.0)
        return 1 - level if values[0] < values[-1] else level  # Mochi's rise

    def _step(self, timestep: torch.Tensor, timesteps: torch.Tensor, scheduler: Any, running: Any) -> int | None:
        current = current_timestep(running)
        for given in (timestep, current):
            if (step := place_in(timesteps, given)) is not None:
                return step
        if getattr(scheduler, "num_inference_steps", None) is None:  # these are the timesteps of training
            return None
        if isinstance(current, torch.Tensor) and current.ndim:
            # Diffusion forcing: each frame has its own timestep and its own copy of the scheduler, and this one never moves.
            # The noisiest frame of the call counts.
            noisiest = int(timestep.max())
            return sum(int(value) > noisiest for value in self._on_host(timesteps))
        counts = hasattr(scheduler, "step_index")
        if counts:
            step = scheduler.step_index
            if step is None:
                step = getattr(scheduler, "begin_index", None)
            if step is None and (left := timesteps_to_run(running)) is not None:
                step = max(len(timesteps) - left, 0)
            if step is not None and step < len(timesteps):
                return int(step)
        # Rising noise levels (Mochi's) are no timesteps that a family would give.
        rising = getattr(getattr(scheduler, "config", None), "invert_sigmas", False)
        step = None if rising else self._search(timestep, timesteps)
        if step is None and counts and running is not None and scheduler.step_index is None:
            return (
                0  # nothing has been run of this schedule, and the denoiser is given something else than its timesteps
            )
        return step

    def _on_host(self, timesteps: torch.Tensor) -> list[float]:
        if self._run.values is None:
            self._run.values = [float(value) for value in timesteps.tolist()]
        return self._run.values

    def _search(self, timestep: torch.Tensor, timesteps: torch.Tensor) -> int | None:
        """The step with the timestep nearest to this one, or None if none is near. Of equal ones the last."""
        value, values = float(timestep.max()), self._on_host(timesteps)
        best = min(range(len(values)), key=lambda i: (abs(values[i] - value), -i), default=None)
        if best is None or abs(values[best] - value) > ROUNDING * max(abs(values[best]), abs(value)):
            return None
        return best


def place_in(timesteps: torch.Tensor, value: Any) -> int | None:
    """Which element of ``timesteps`` (N,) ``value`` is a view of, by its address; None for any other tensor. Reads no element.

    value: one number, or one that was expanded; a tensor of several numbers is the view of no single one.
    """
    if not isinstance(value, torch.Tensor) or value.device != timesteps.device or value.dtype != timesteps.dtype:
        return None
    if not value.numel() or any(n > 1 and s for n, s in zip(value.shape, value.stride(), strict=True)):
        return None
    memory = timesteps.untyped_storage().data_ptr()
    if not memory or value.untyped_storage().data_ptr() != memory:
        return None
    offset = int(value.storage_offset() - timesteps.storage_offset())
    step, between = divmod(offset, max(timesteps.stride(0), 1))
    return step if not between and 0 <= step < len(timesteps) else None


def by_noise_level(timestep: torch.Tensor) -> Position:
    """The position by the noise level that a timestep in 0 … 1000 names; reads it from the device."""
    level = min(max(float(timestep.max()) / 1000, 0.0), 1.0)
    return Position(min(FINE - 1, round((1 - level) * FINE)), FINE, steps=FINE)


# ── the pipeline that is running ─────────────────────────────────────────────────────────────────────────────────


def running_pipeline(denoiser: nn.Module) -> Any:
    """The diffusers pipeline that is calling ``denoiser`` in this thread, or None."""
    return next((pipe for pipe, _ in _running(denoiser)), None)


def argument_of_run(denoiser: nn.Module, name: str) -> Any:
    """What that pipeline was given as an argument of its ``__call__``, as far as it was not assigned anew; None: nothing."""
    for _, frame in _running(denoiser):
        if frame.f_code.co_name == "__call__" and name in frame.f_code.co_varnames:
            return local_variable(frame, name)
    return None


def _running(denoiser: nn.Module) -> Iterator[tuple[Any, FrameType]]:
    """The pipelines that hold ``denoiser`` and whose methods are running in this thread, innermost first, and their frames."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_pipelines(frame):
            pipe = first_argument(frame)
            if isinstance(pipe, pipeline_classes()) and _holds(pipe, denoiser):
                yield pipe, frame
        frame = frame.f_back


@cache
def pipeline_classes() -> tuple[type, ...]:
    """What a pipeline is an instance of. Not imported with this module: it takes seconds, and plans and presets do without."""
    from diffusers import DiffusionPipeline, ModularPipeline

    return DiffusionPipeline, ModularPipeline


def _is_pipelines(frame: FrameType) -> bool:
    """Whether a frame runs a method of a pipeline class, by its code alone: a caller's variables are not looked at lightly."""
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != "self":
        return False
    owner, _, _ = code.co_qualname.rpartition(".")
    if "." in owner:  # a class made in a function or in another class is not found by its name
        return code.co_name == "__call__"
    found = frame.f_globals.get(owner)
    return inspect.isclass(found) and issubclass(found, pipeline_classes())


def first_argument(frame: FrameType) -> Any:
    """What a frame of a method has as ``self``, or None."""
    return local_variable(frame, "self")


def local_variable(frame: FrameType, name: str) -> Any:
    """A variable of a frame, or None."""
    variables = frame.f_locals
    found = variables.get(name)
    # Before Python 3.13 these are a copy that the frame keeps, and with it all tensors that it names. Emptied, unless somebody
    # else has it: ``locals()`` gives the same one. (Counted are the frame's reference, ours and the call's.)
    if sys.version_info < (3, 13) and sys.getrefcount(variables) <= 3:
        variables.clear()
    return found


def _holds(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether a denoiser is a component of a pipeline, itself or inside what wraps it (torch.compile, PEFT)."""
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    if any(uncompiled(part) is denoiser for part in parts):
        return True
    return any(module is denoiser for part in parts for module in part.modules())
