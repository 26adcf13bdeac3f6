"""Chunks of latents by the formulas, in float64: a naive loop for each solver of the causal sampler.

Flow matching: x_σ = (1 − σ)·x0 + σ·ε and v = ε − x0, so x0 = x_σ − σ·v. Nothing here is shared with ``pipelines/streaming`` but
the recipe's fields, and the noises: both draw float32 from a generator, in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from tilewise.pipelines.streaming.recipe import CausalRecipe

Context = tuple[torch.Tensor, float]  # latents and timestep of the pass that wrote a chunk's keys and values
Velocity = Callable[[torch.Tensor, float, int, list[Context]], torch.Tensor]  # of x, timestep, lane, chunks before


def noise_levels(timesteps: tuple[float, ...], recipe: CausalRecipe) -> list[float]:
    shares = [timestep / 1000 for timestep in timesteps]
    return [recipe.shift * t / (1 + (recipe.shift - 1) * t) for t in shares] if recipe.warp else shares


def uni_pc(x: torch.Tensor, sigmas: list[float], v: Callable) -> torch.Tensor:
    """UniP and UniC (arXiv 2302.04867) of order 2 with B(h) = e^h − 1, for predictions of x0, with λ = log((1 − σ)/σ).

    As in diffusers, noise levels are float32, one of 1 is taken as 1 − 10⁻⁶, and the last step is of order 1.
    """
    levels = torch.tensor([min(s, 1 - 1e-6) for s in sigmas], dtype=torch.float32).tolist()
    at = [math.log((1 - s) / s) for s in levels] + [math.inf]
    clean: list[torch.Tensor] = []  # x0 of every pass
    before, order = x, 0  # x of the pass before after its correction, and the order of the step from there

    def first_order(x: torch.Tensor, i: int, m: torch.Tensor) -> torch.Tensor:
        """From pass i to i + 1 with one x0."""
        sigma = [*levels, 0.0][i + 1]
        return sigma / levels[i] * x + (1 - sigma) * -math.expm1(at[i] - at[i + 1]) * m

    for i, sigma in enumerate(sigmas):
        m = x - levels[i] * v(x, sigma)
        if i > 0:  # the corrector, of the order of the step that led here
            z, last = at[i - 1] - at[i], clean[-1]
            step = (1 - levels[i]) * -math.expm1(z)
            x = first_order(before, i - 1, last)
            if order == 1:
                x = x + step * (m - last) / 2
            else:
                ratio = (at[i - 2] - at[i - 1]) / -z
                phi2 = math.expm1(z) / z - 1
                b1, b2 = phi2 / math.expm1(z), 2 * (phi2 / z - 1 / 2) / math.expm1(z)
                rho1 = (b1 - b2) / (1 - ratio)
                x = x + step * (rho1 * (clean[-2] - last) / ratio + (b1 - rho1) * (m - last))
        before, order = x, min(2, i + 1, len(sigmas) - i)
        x = first_order(before, i, m)
        if order == 2:  # the predictor
            ratio = (at[i - 1] - at[i]) / (at[i + 1] - at[i])
            x = x + (1 - levels[i + 1]) * -math.expm1(at[i] - at[i + 1]) * (clean[-1] - m) / ratio / 2
        clean.append(m)
    return x


def reference(recipe: CausalRecipe, lengths: list[int], velocity: Velocity, shape: tuple, seed: int) -> list:
    """Latents of chunks of so many frames, the first of them with the recipe's own timesteps for it."""
    generator, made = torch.Generator().manual_seed(seed), []
    contexts: list[list[Context]] = [[], []]  # of each lane

    def noise(frames: int) -> torch.Tensor:
        return torch.randn(1, shape[0], frames, *shape[1:], generator=generator).double()

    def guided(x: torch.Tensor, sigma: float) -> torch.Tensor:
        positive = velocity(x, 1000 * sigma, 0, contexts[0])
        if recipe.guidance == 1:
            return positive
        negative = velocity(x, 1000 * sigma, 1, contexts[1])
        return negative + recipe.guidance * (positive - negative)

    for number, frames in enumerate(lengths):
        own = number == 0 and recipe.first_timesteps is not None
        sigmas = noise_levels(recipe.first_timesteps if own else recipe.timesteps, recipe)
        x = noise(frames)
        if recipe.solver == "unipc":
            x = uni_pc(x, sigmas, guided)
        else:
            for sigma, following in itertools.pairwise([*sigmas, 0.0]):
                v = guided(x, sigma)
                if recipe.solver == "euler":
                    x = x + (following - sigma) * v
                else:
                    x = x - sigma * v
                    x = (1 - following) * x + following * noise(frames) if following else x
        made.append(x)
        level = recipe.context_noise / 1000
        context = (1 - level) * x + level * noise(frames) if level else x
        for lane in contexts:
            lane.append((context, recipe.context_noise))
    return made
