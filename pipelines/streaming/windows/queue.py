"""The queue of the way ``diagonal``: it stands in for the pipeline's scheduler during a call, and tells each frame its timestep.

The call goes through a pass for each part of the queue and round. What its scheduler returns after a pass is the window of the
next part. Frames go down by Euler steps, x ← x + (σ_{i+1} − σ_i) · v, each by its own i.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.streaming.windows.noise import TRAIN_STEPS, level_after
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute


class FrameQueue:
    """Latent frames on their way from noise to finished.

    Args:
        pipe: the pipeline. space: of its latents. shape: (t, h, w) of a window. chunk: new frames of a window.
        steps: noise levels that a frame goes through, a multiple of chunk; as many frames are on their way.
        generator: of the noise.

    Attributes:
        latents: (1, C, steps, h, w) of the frames; None: not begun. passed: how many levels each has gone through.
        levels: σ of all levels, once a call has asked for them.
    """

    def __init__(
        self,
        pipe: Any,
        space: LatentSpace,
        shape: tuple[int, int, int],
        *,
        chunk: int,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.pipe, self.space, self.shape = pipe, space, shape
        self.chunk, self.steps, self.generator = chunk, steps, generator
        self.latents: torch.Tensor | None = None
        self.passed = [0] * steps
        self._done: torch.Tensor | None = None  # finished frames, the last of which stand in front of the queue
        self._left: list[list[int]] = []  # parts that are still to be denoised, by round
        self.levels: list[float] = []

    def clear(self) -> None:
        """Forget all frames; the next ones begin as noise."""
        self.latents, self.passed = None, [0] * self.steps

    def begin(self, tail: torch.Tensor) -> None:
        """Prepare a call that finishes the next ``chunk`` frames. tail: (1, C, k, h, w), the last finished ones."""
        self._done = tail
        if self.latents is None:
            self.latents = self._noise(self.steps).to(tail)
        self._left = list(self._rounds())

    def finished(self, overlap: int) -> torch.Tensor:
        """What the call finished, behind the ``overlap`` frames that were given to it."""
        assert self._done is not None
        return self._done[:, :, : overlap + self.chunk]

    def _noise(self, frames: int) -> torch.Tensor:
        channels = self.space.channels(self.pipe.vae)
        size = (1, channels, frames, *self.shape[1:])
        return torch.randn(size, generator=self.generator, device=self.generator.device)

    def _rounds(self) -> Iterator[list[int]]:
        """The parts of each round until ``chunk`` frames are finished, the last part first: what stands in front of a part is as
        the round before left it."""
        passed, finished = list(self.passed), 0
        while finished < self.chunk:
            turns = _turns(passed)
            parts = range(self.steps // self.chunk)
            yield [p for p in reversed(parts) if any(turns[p * self.chunk : (p + 1) * self.chunk])]
            passed = [count + turn for count, turn in zip(passed, turns, strict=True)]
            if passed[0] == self.steps:
                passed, finished = [*passed[1:], 0], finished + 1

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

    def window(self) -> torch.Tensor:
        """(1, C, t, h, w): the next part, behind the frames in front of it."""
        assert self._done is not None and self.latents is not None
        end = self._done.shape[2] + (self._part + 1) * self.chunk
        return torch.cat([self._done, self.latents], 2)[:, :, end - self.shape[0] : end]

    def timesteps(self) -> torch.Tensor:
        """(t,) of the frames of ``window``."""
        assert self._done is not None
        levels = [0.0] * self._done.shape[2] + [self.levels[count] for count in self.passed]
        end = self._done.shape[2] + (self._part + 1) * self.chunk
        return torch.tensor(levels[end - self.shape[0] : end], device=self._done.device) * TRAIN_STEPS

    @property
    def _part(self) -> int:
        return self._left[0][0]

    def _step(self, velocity: torch.Tensor) -> None:
        """Take the frames of the part whose window was denoised a level down. velocity: (1, C, t, h, w)."""
        assert self.latents is not None
        turns, first = self._turns_now, self._part * self.chunk
        for frame in range(first, first + self.chunk):
            if turns[frame]:
                by = self.levels[self.passed[frame] + 1] - self.levels[self.passed[frame]]
                own = velocity[:, :, frame - first - self.chunk].to(self.latents)
                self.latents[:, :, frame] += by * own
        del self._left[0][0]
        if not self._left[0]:
            self._end_round(turns)

    @property
    def _turns_now(self) -> list[bool]:
        return _turns(self.passed)

    def _end_round(self, turns: list[bool]) -> None:
        assert self.latents is not None and self._done is not None
        del self._left[0]
        self.passed = [count + turn for count, turn in zip(self.passed, turns, strict=True)]
        if self.passed[0] == self.steps:
            self._done = torch.cat([self._done, self.latents[:, :, :1]], 2)
            self.latents = torch.cat([self.latents[:, :, 1:], self._noise(1).to(self.latents)], 2)
            self.passed = [*self.passed[1:], 0]

    @contextlib.contextmanager
    def scheduling(self) -> Iterator[None]:
        """Run a call of the pipeline in which its scheduler goes through the queue."""
        scheduler = self.pipe.scheduler
        own_timesteps, own_step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(own_timesteps)  # pipelines look at the signatures
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            own_timesteps(*args, **kwargs)
            self.levels = [level_after(scheduler, step) for step in range(len(scheduler.timesteps) + 1)]
            passes = sum(map(len, self._left))
            # Of no meaning but their number: each frame has its own.
            scheduler.timesteps = torch.linspace(TRAIN_STEPS, TRAIN_STEPS / passes, passes).to(scheduler.timesteps)
            scheduler.sigmas = torch.linspace(1, 0, passes + 1).to(scheduler.sigmas)

        @functools.wraps(own_step)
        def step(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._step(self.space.unpacked(self.pipe, velocity, self.shape))
            following = self.space.packed(self.pipe, self.window()) if self._left else sample
            return (following.to(sample),)

        with (
            temporary_attribute(scheduler, "set_timesteps", set_timesteps),
            temporary_attribute(scheduler, "step", step),
        ):
            yield


def _turns(passed: list[int]) -> list[bool]:
    """Which frames go a level down in a round: the first one, and those that the one in front of them is ahead of."""
    return [True, *(before > own for before, own in itertools.pairwise(passed))]
