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
        at = getattr(pipe, "_current_timestep", None)
        if isinstance(at, torch.Tensor) and at.ndim:
            # Diffusion forcing: each frame has its own timestep and its own copy of the scheduler, and this one never moves.
            # The noisiest frame of the call counts (one number read from the device, as the pipeline does for each frame).
            step = int((timesteps.long() > timestep.max().long()).sum())
        else:
            # Video-to-video drops the first timesteps without telling the scheduler; the pipeline knows how many are left.
            step = len(timesteps) - (getattr(pipe, "_num_timesteps", None) or len(timesteps))
    if step >= len(timesteps):
        return _by_noise_level(timestep)
    return step, len(timesteps)


def _by_noise_level(timestep: torch.Tensor) -> tuple[int, int]:
    level = min(max(float(timestep.max()) / 1000, 0.0), 1.0)
    return min(FINE - 1, round((1 - level) * FINE)), FINE
