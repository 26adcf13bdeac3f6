"""Entering a denoising schedule part-way, with any stock pipeline: for a stage that begins from a noised clip.

n steps, strength r:  the last ⌊n·r⌋ of them run;  x = (1 − σ) x₀ + σ ε  at the first one's noise level σ     (flow matching)
flow shift m:         σ ← m σ / (1 + (m − 1) σ): more of the steps at high noise        (arXiv 2403.03206, §5.3.2)
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilewise.plugins.errors import ConfigError, UnsupportedModelError


def steps_to_run(steps: int, strength: float) -> int:
    """How many of ``steps`` a strength in (0, 1] leaves.

    Raises:
        ConfigError: for a strength outside that, or one that leaves no step.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ConfigError(f"strength must be in (0, 1], not {strength!r}")
    left = int(steps * strength + 1e-9)
    if left < 1:
        raise ConfigError(f"strength {strength} leaves none of {steps} steps; at least {1 / steps:.3g} is needed")
    return left


@contextmanager
def entered_at(pipe: Any, steps: int, strength: float, flow_shift: float | None) -> Iterator[Any]:
    """Run a block with a scheduler that makes the last steps of ``steps`` alone; yields that scheduler.

    The pipeline's own comes back afterwards, unchanged. flow_shift: None leaves the scheduler's own.

    Raises:
        ConfigError: for a strength or shift that cannot be.
        UnsupportedModelError: a scheduler without flow-matching noise levels, or of several forwards a step.
    """
    left = steps_to_run(steps, strength)
    own = pipe.scheduler
    scheduler = _shifted(own, flow_shift)
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedModelError(f"{type(own).__name__} takes several forwards a step; use a scheduler of order 1")
    whole = scheduler.set_timesteps

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        drop = len(self.timesteps) - min(left, len(self.timesteps))
        self.timesteps = self.timesteps[drop:]
        self.sigmas = self.sigmas[drop:]
        self.num_inference_steps = len(self.timesteps)

    scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)
    pipe.scheduler = scheduler
    try:
        yield scheduler
    finally:
        pipe.scheduler = own


def noised(clean: torch.Tensor, scheduler: Any, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Clean latents at the noise level at which ``entered_at``'s scheduler begins. The noise is drawn on the CPU."""
    scheduler.set_timesteps(steps, device="cpu")
    sigma = float(scheduler.sigmas[0])
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean.device)
    return (1 - sigma) * clean.float() + sigma * noise


def _shifted(scheduler: Any, flow_shift: float | None) -> Any:
    """A copy of a flow-matching scheduler with another shift."""
    config = scheduler.config
    names = [name for name in ("flow_shift", "shift") if name in config]
    flow = bool(names) and config.get("use_flow_sigmas", True) and hasattr(scheduler, "sigmas")
    if not flow:
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} is no flow-matching scheduler: a stage cannot begin part-way through its schedule"
        )
    if flow_shift is None:
        return copy.deepcopy(scheduler)
    if isinstance(flow_shift, bool) or not isinstance(flow_shift, int | float) or flow_shift <= 0:
        raise ConfigError(f"flow_shift must be a number above 0, not {flow_shift!r}")
    if config.get("use_dynamic_shifting"):
        raise ConfigError(f"{type(scheduler).__name__} shifts by the size of the picture itself; give flow_shift=None")
    return type(scheduler).from_config(config, **{names[0]: float(flow_shift)})
