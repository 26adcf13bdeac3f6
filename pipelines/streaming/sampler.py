"""Few-step sampling of one chunk of latents after another, against the KV caches of one or two denoisers.

A chunk begins as noise and goes through the noise levels σ_1 > … > σ_n of its recipe. With the velocity v of a pass,

    renoise   x0 = x − σ_i·v,  x ← (1 − σ_{i+1})·x0 + σ_{i+1}·fresh noise      (Self-Forcing, arXiv 2506.08009, algorithm 1)
    euler     x ← x + (σ_{i+1} − σ_i)·v
    unipc     diffusers' UniPCMultistepScheduler over these noise levels

with σ_{n+1} = 0. A last pass over the clean chunk, at the recipe's context noise, writes its keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tilewise.pipelines.streaming.recipe import TRAIN_STEPS, CausalRecipe
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser

LEAST_STEP = 0.02  # between two noise levels: a pass for less would change nothing
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x and its velocity


@dataclass
class TextStates:
    """What the passes are conditioned on: (B, tokens, width) each. negative: None without guidance."""

    positive: torch.Tensor
    negative: torch.Tensor | None = None

    @property
    def lanes(self) -> list[torch.Tensor]:
        """One a lane of the caches."""
        return [self.positive] if self.negative is None else [self.positive, self.negative]


class CausalSampler:
    """Makes chunks of latents.

    Args:
        denoisers: one, or two where the recipe has a boundary: for its noise levels above and below.
        recipe: how.
        shape: (C, h, w) of a latent frame. generator: of all noise, on its own device.
        dtype: that the denoisers take their latents in.

    Attributes:
        text: conditioning of the next pass.
    """

    def __init__(
        self,
        denoisers: Sequence[CausalDenoiser],
        recipe: CausalRecipe,
        text: TextStates,
        *,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.denoisers = list(denoisers)
        self.recipe = recipe
        self.text = text
        self.shape = shape
        self.generator = generator
        self.device = device
        self.dtype = dtype

    @property
    def next_frame(self) -> int:
        """Number of the latent frame that comes next."""
        return self.denoisers[0].next_frame

    def chunk(
        self,
        frames: int,
        *,
        first: bool = False,
        clean: torch.Tensor | None = None,
        strength: float = 1.0,
        between: Callable[[], None] = lambda: None,
        ready: Callable[[torch.Tensor], None] = lambda latents: None,
    ) -> torch.Tensor:
        """The next chunk, normalised latents (1, C, frames, h, w) float32.

        first: whether it goes by the recipe's noise levels for the first chunk. clean: latents (1, C, frames, h, w) that it is to
        be made from, and strength: the noise level that they are brought to, 0 … 1; the passes are those of the recipe below it,
        and none at 0. between: called before every pass; may raise, and
        the chunk is dropped then. ready: called with the chunk before the pass that writes the caches.
        """
        sigmas = self.recipe.sigmas(first)
        if clean is not None:
            sigmas = levels_below(sigmas, strength)
        for denoiser in self.denoisers:
            denoiser.begin(frames)
        x = self._noise(frames) if clean is None else self._noised(clean, strength)
        for number, (sigma, x_of) in enumerate(self._solver(sigmas)):
            between()
            x = x_of(x, self._velocity(x, sigma, number, len(sigmas)))
        between()
        ready(x)
        self._write(x)
        return x

    def given(self, latents: torch.Tensor) -> None:
        """Latents (1, C, frames, h, w) that are there already, as of an image: they come next."""
        for denoiser in self.denoisers:
            denoiser.begin(latents.shape[2])
        self._write(latents)

    def rewrite(self, latents: torch.Tensor, chunks: Sequence[int]) -> None:
        """Compute keys and values of all frames but the sink's anew, with the present text.

        latents: (1, C, frames, h, w), clean, of the frames that ``CausalDenoiser.drop_ring`` returns. chunks: in what lengths.
        """
        for denoiser in self.denoisers:
            denoiser.drop_ring()
        for part in latents.split(list(chunks), 2):
            self.given(part)

    # ── parts of a chunk ─────────────────────────────────────────────────────────────────────────────────────────

    def _noise(self, frames: int) -> torch.Tensor:
        channels, height, width = self.shape
        size = (1, channels, frames, height, width)
        return torch.randn(size, generator=self.generator, device=self.generator.device).to(self.device)

    def _solver(self, sigmas: Sequence[float]) -> Iterator[tuple[float, Step]]:
        """(σ, what makes the next x of this one and its velocity) of each pass."""
        if not sigmas:
            return
        if self.recipe.solver == "unipc":
            yield from _unipc(sigmas)
            return
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            if self.recipe.solver == "euler":
                yield sigma, functools.partial(_euler, following - sigma)
            else:
                yield sigma, functools.partial(self._renoise, sigma, following)

    def _renoise(self, sigma: float, following: float, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        return self._noised(x - sigma * velocity, following)

    def _noised(self, clean: torch.Tensor, sigma: float) -> torch.Tensor:
        return clean if sigma <= 0 else (1 - sigma) * clean + sigma * self._noise(clean.shape[2])

    def _velocity(self, x: torch.Tensor, sigma: float, step: int, steps: int) -> torch.Tensor:
        denoiser = self._denoiser(sigma)
        denoiser.step, denoiser.steps = step, steps
        found = [self._forward(denoiser, x, sigma * TRAIN_STEPS, lane) for lane in range(len(self.text.lanes))]
        if len(found) == 1:
            return found[0]
        positive, negative = found
        return negative + self.recipe.guidance * (positive - negative)

    def _denoiser(self, sigma: float) -> CausalDenoiser:
        boundary = self.recipe.boundary
        return self.denoisers[0 if boundary is None or sigma >= boundary else 1]

    def _forward(self, denoiser: CausalDenoiser, x: torch.Tensor, timestep: float, lane: int) -> torch.Tensor:
        at = torch.full((x.shape[0],), timestep, device=self.device)
        return denoiser(x.to(self.dtype), at, self.text.lanes[lane], lane=lane).float()

    def _write(self, clean: torch.Tensor) -> None:
        """Leave the keys and values of a finished chunk in every cache."""
        noise = self.recipe.context_sigma()
        context, steps = self._noised(clean, noise), len(self.recipe.timesteps)
        for denoiser in self.denoisers:
            denoiser.step, denoiser.steps = steps - 1, steps
            for lane in range(len(self.text.lanes)):
                self._forward(denoiser, context, self.recipe.context_noise, lane)
            denoiser.commit()


def levels_below(sigmas: Sequence[float], strength: float) -> tuple[float, ...]:
    """The noise levels of a chunk that begins at one: that level, and those of a recipe below it."""
    return (strength, *(sigma for sigma in sigmas if sigma < strength - LEAST_STEP)) if strength > 0 else ()


def _euler(by: float, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    return x + by * velocity


def _unipc(sigmas: Sequence[float]) -> Iterator[tuple[float, Step]]:
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(sigmas))  # a list is not taken
    # Without this it looks the first timestep up in whole numbers, and takes the second of two passes that share one.
    scheduler.set_begin_index(0)

    def step(timestep: torch.Tensor, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        following: torch.Tensor = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return following

    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=True):
        yield sigma, functools.partial(step, timestep)
