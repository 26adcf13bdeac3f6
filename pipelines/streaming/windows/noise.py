"""Noise levels of a pipeline's scheduler, and latents at one of them.

flow matching            x_σ = (1 − σ) x₀ + σ ε
diffusion (CogVideoX)    x_σ = √(1 − σ²) x₀ + σ ε,    σ² = 1 − ᾱ
"""

from __future__ import annotations

import math
from typing import Any

import torch

TRAIN_STEPS = 1000.0  # timesteps are counted from 0 (clean) to this (pure noise)


def is_diffusion(scheduler: Any) -> bool:
    """Whether noise keeps the variance, as of the schedulers of CogVideoX, and not the sum of the shares."""
    return scheduler.config.get("prediction_type") != "flow_prediction" and hasattr(scheduler, "alphas_cumprod") and (
        not scheduler.config.get("use_flow_sigmas")
    )  # fmt: skip


def untold_noise(scheduler: Any) -> str | None:
    """Why the noise level after a pass cannot be told of a scheduler, or None."""
    if (order := getattr(scheduler, "order", 1)) != 1:
        return f"takes {order} forwards a step"
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        return "has latents that are larger the more noise is in them; DDIMScheduler's are not"
    if not (is_diffusion(scheduler) or hasattr(scheduler, "sigmas")):
        return "has no noise levels that are known before they are reached"
    return None


def level_after(scheduler: Any, step: int) -> float:
    """σ after so many passes of the schedule that is set; 0 after the last."""
    if is_diffusion(scheduler):
        if step >= len(scheduler.timesteps):
            return 0.0
        return math.sqrt(max(0.0, 1 - float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])))
    sigma = float(scheduler.sigmas[step])
    return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma  # Mochi's are shares of the clip, and rise


def noised(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, level: float) -> torch.Tensor:
    """Clean latents at a noise level σ."""
    share = math.sqrt(1 - level**2) if is_diffusion(scheduler) else 1 - level
    return share * clean + level * noise
