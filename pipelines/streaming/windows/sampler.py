"""One window after another by the stock pipeline's own call, held to the tail of the window before.

The call runs as it is, with its scheduler, guidance, both denoisers and callbacks; the matrix of noise levels of a way
(``ways/base.py``) is written into its latents after each pass, and into the timesteps of its forwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import stock_call
from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.streaming.windows.noise import TRAIN_STEPS, level_after, noised
from tilewise.pipelines.streaming.windows.prompts import WindowText, blended_text
from tilewise.pipelines.streaming.windows.queue import FrameQueue
from tilewise.pipelines.streaming.windows.strength import begun_at, first_pass, schedule_of
from tilewise.pipelines.streaming.windows.ways.base import Way
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.runtime.earlier_keys import EarlierKeys


class WindowSampler:
    """Makes windows of latents.

    Args:
        pipe: the pipeline. space: of its latents. settings: of a clip that is a window.
        way: how a window goes on. prefix_noise: see ``WindowRecipe``.
        generator: of all noise, on the CPU: the first window's is drawn by the pipeline, as in a call of it.
        earlier: keys of earlier windows that the denoisers keep.

    Attributes:
        queue: of frames, by a way that has one, set after it is made.
    """

    def __init__(
        self,
        pipe: Any,
        space: LatentSpace,
        settings: GenerateSettings,
        way: Way,
        *,
        prefix_noise: float,
        generator: torch.Generator,
        earlier: Sequence[EarlierKeys] = (),
    ) -> None:
        self.pipe, self.space, self.settings, self.way = pipe, space, settings, way
        self.earlier = list(earlier)
        self.queue: FrameQueue | None = None
        self.prefix_noise = prefix_noise
        self.generator = generator
        self.shape = space.shape(pipe, settings.height, settings.width, settings.frames)
        self.channels = space.channels(pipe.vae)
        self._levels: list[float] | None = None  # of the whole schedule

    def levels(self, overlap: int, rows: int = 10) -> dict[str, list[Any]]:
        """Noise levels of a window that goes on from `overlap` latent frames: "levels", rows at most, evenly taken, and "passes",
        the number of each. They are those of the schedule that the scheduler has."""
        scheduler = self.pipe.scheduler
        sigmas = [] if self.queue is None else self.queue.levels
        sigmas = sigmas or [level_after(scheduler, step) for step in range(len(scheduler.timesteps) + 1)]
        passes = sorted({round(i * (len(sigmas) - 1) / (rows - 1)) for i in range(rows)})
        levels = self.way.matrix(sigmas, self.shape[0], overlap, self.prefix_noise)
        return {"levels": levels[passes].tolist(), "passes": passes}

    def window(
        self,
        tail: torch.Tensor | None,
        text: WindowText,
        between: Callable[[], None] = lambda: None,
        *,
        frames: NDArray[np.uint8] | None = None,
        clean: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """The next window, normalised latents (1, C, t, h, w) float32.

        tail: (1, C, k, h, w), the last latents of the window before; None: the first window, the stock pipeline's clip.
        frames: (F, H, W, 3) that it begins with, by a way that restarts.
        clean: (1, C, t, h, w) that it is to be made from, and strength: 0 … 1, the noise level that they are brought to, or
            the nearest of the schedule.
        between: called after every pass; may raise, and the window is dropped then.
        """
        between()
        for kept in self.earlier:
            kept.begin_window()
        settings = dataclasses.replace(self.settings, prompt=text.prompt)
        if self.queue is not None and tail is not None:
            return self._queued(self.queue, settings, tail, text, between)
        given: dict[str, Any] = {"generator": self.generator, "output_type": "latent"}
        if frames is not None:
            given |= self.way.arguments(self.pipe, frames, settings.frames)
        first, sigma = self._begin(settings, given, strength) if clean is not None else (0, 1.0)
        noise = None if tail is None and clean is None else self._noise()
        held = None if tail is None or noise is None else _Held(self, tail, noise)
        if noise is not None:
            begin = noise if clean is None else noised(self.pipe.scheduler, clean, noise.to(clean), sigma)
            if held is not None:
                begin = held.within(begin.to(held.tail), sigma)
            if sigma == 0:
                return begin
            given["latents"] = self.space.packed(self.pipe, begin)

        def done(step: int, steps: int, latents: torch.Tensor) -> None:
            if held is not None:
                held.put(latents, level_after(self.pipe.scheduler, step))
            between()

        with (
            self._calling(text),
            contextlib.nullcontext() if held is None else held.timesteps(),
            contextlib.nullcontext() if not first else begun_at(self.pipe, first),
        ):
            out = stock_call(self.pipe, settings, done, **given)
        return self.space.finished(self.pipe, out, self.shape).float()

    @contextlib.contextmanager
    def _calling(self, text: WindowText) -> Iterator[None]:
        bar = {**getattr(self.pipe, "_progress_bar_config", {}), "disable": True}
        with temporary_attribute(self.pipe, "_progress_bar_config", bar), blended_text(self.pipe, text):
            yield

    def _queued(
        self,
        queue: FrameQueue,
        settings: GenerateSettings,
        tail: torch.Tensor,
        text: WindowText,
        between: Callable[[], None],
    ) -> torch.Tensor:
        """A window of which the queue finished the frames behind the tail."""
        if text.flush:
            queue.clear()
        queue.begin(tail)
        given = {"latents": self.space.packed(self.pipe, queue.window()), "output_type": "latent"}
        given["generator"] = torch.Generator(self.generator.device)  # all noise is the queue's own
        with self._calling(text), queue.scheduling(), told_timesteps(self.pipe, queue.timesteps):
            stock_call(self.pipe, settings, lambda *_: between(), **given)
        return queue.finished(tail.shape[2]).float()

    def _noise(self) -> torch.Tensor:
        size = (1, self.channels, *self.shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)

    def _begin(self, settings: GenerateSettings, given: dict[str, Any], strength: float) -> tuple[int, float]:
        """The pass that a window begins with, and its noise level."""
        if self._levels is None:
            own = {**given, "generator": torch.Generator(self.generator.device)}
            self._levels = schedule_of(self.pipe, lambda: stock_call(self.pipe, settings, lambda *_: None, **own))
        first = first_pass(self._levels, strength)
        return first, self._levels[first]


class _Held:
    """The columns of a window that its tail is held in."""

    def __init__(self, sampler: WindowSampler, tail: torch.Tensor, noise: torch.Tensor) -> None:
        self.sampler, self.tail = sampler, tail
        k = tail.shape[2]
        self.noise = noise[:, :, :k].to(tail, copy=True)
        self.share = sampler.way.shares(k).to(tail).view(1, 1, -1, 1, 1)

    def within(self, window: torch.Tensor, sigma: float) -> torch.Tensor:
        """A window at noise level sigma with these columns in it."""
        k = self.tail.shape[2]
        return torch.cat([self._mixed(window[:, :, :k], sigma), window[:, :, k:]], 2)

    def _mixed(self, own: torch.Tensor, sigma: float) -> torch.Tensor:
        """The columns at the window's noise level sigma."""
        level = self.sampler.way.level(sigma, self.sampler.prefix_noise) if sigma > 0 else 0.0
        return torch.lerp(own, noised(self.sampler.pipe.scheduler, self.tail, self.noise, level), self.share)

    def put(self, latents: torch.Tensor, sigma: float) -> None:
        """Write the columns into what the pipeline holds, in place."""
        space, pipe = self.sampler.space, self.sampler.pipe
        whole = space.unpacked(pipe, latents, self.sampler.shape)
        latents.copy_(space.packed(pipe, self.within(whole.float(), sigma).to(whole)))

    def timesteps(self) -> contextlib.AbstractContextManager[None]:
        """For a block in which the denoisers are told the columns' own noise levels."""
        if not self.sampler.way.per_frame:
            return contextlib.nullcontext()
        noise = self.sampler.prefix_noise * TRAIN_STEPS
        lead = torch.full((self.tail.shape[2],), noise, device=self.tail.device)
        return told_timesteps(self.sampler.pipe, lambda: lead)


@contextlib.contextmanager
def told_timesteps(pipe: Any, lead: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Run a block in which the denoisers are told other timesteps of the first latent frames; see ``with_lead_timesteps``."""
    with contextlib.ExitStack() as undo:
        for denoiser in denoisers_of(pipe).values():
            family = family_of(denoiser)
            assert family is not None

            def before(module: Any, args: tuple, kwargs: dict[str, Any], family: Any = family) -> Any:
                return family.with_lead_timesteps(module, args, kwargs, lead())

            # First of all: what else looks at the timesteps sees these.
            handle = denoiser.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            undo.callback(handle.remove)
        yield
