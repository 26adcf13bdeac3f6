"""Where in the denoising schedule a forward is, without asking the GPU."""

from __future__ import annotations

from typing import Any

import torch

# Resolution of a schedule position that is read off a timestep's value.
FINE = 1000


def step_of(pipe: Any, timestep: torch.Tensor) -> tuple[int, int]:
    """(step, total): this forward is step ``step`` of ``total``, counted from 0 over the whole noise schedule.

    A diffusers scheduler counts its steps on the host, so both numbers cost no synchronisation; they are right for any number
    of steps, for multi-step solvers, for repeated calls, and for video-to-video, which enters the schedule part-way. Without a
    pipeline, or with one whose scheduler is not in use or at its end (another pipeline is running the same denoiser), the noise
    level stands in: the timestep's value over 1000 (this reads one number from the device).
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if (
        timesteps is None
        or getattr(scheduler, "num_inference_steps", None) is None
        or not hasattr(scheduler, "step_index")
    ):
        return _by_noise_level(timestep)
    step = scheduler.step_index
    if step is None:  # before the first step
        step = scheduler.begin_index
    if step is None:
        # Video-to-video drops the first timesteps without telling the scheduler; the pipeline knows how many are left.
        step = len(timesteps) - (getattr(pipe, "_num_timesteps", None) or len(timesteps))
    if step >= len(timesteps):
        return _by_noise_level(timestep)
    return step, len(timesteps)


def _by_noise_level(timestep: torch.Tensor) -> tuple[int, int]:
    level = min(max(float(timestep.max()) / 1000, 0.0), 1.0)
    return min(FINE - 1, round((1 - level) * FINE)), FINE
