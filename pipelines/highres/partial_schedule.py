"""Start a denoising schedule part-way, with any stock pipeline: for a stage that begins from a noised clip.

n steps, strength r:  the last ⌊n·r⌋ of them run;  x = (1 − σ) x₀ + σ ε  at the first one's noise level σ     (flow matching)
flow shift m:         σ ← m σ / (1 + (m − 1) σ): more of the steps at high noise        (arXiv 2403.03206, §5.3.2)
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilewise.pipelines.highres.settings import check_shift, steps_to_run
from tilewise.pipelines.latent_spaces.base import interpolated_mu
from tilewise.plugins.errors import TilewiseError, UnsupportedModelError
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute

_NOISED_TO = "_tilewise_noised_to"  # on the second stage's own copy of a scheduler


@contextmanager
def schedule_calls(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """Note how a run of a pipeline asks its scheduler for timesteps: the arguments by name, of each call."""
    scheduler, calls = pipe.scheduler, []
    whole = scheduler.set_timesteps
    names = inspect.signature(whole)

    @functools.wraps(whole)  # pipelines look at the signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        calls.append(dict(names.bind(*args, **kwargs).arguments))
        whole(*args, **kwargs)

    with temporary_attribute(scheduler, "set_timesteps", set_timesteps):
        yield calls


def last_steps(pipe: Any, steps: int, strength: float, flow_shift: float | None) -> Any:
    """A scheduler like the pipeline's that makes the last steps of ``steps`` alone. The pipeline and its own stay unchanged.

    flow_shift: None leaves the scheduler's own.

    Raises:
        ConfigError: for a strength or shift that cannot be.
        UnsupportedModelError: a scheduler without flow-matching noise levels, or of several forwards a step.
    """
    left = steps_to_run(steps, strength)
    scheduler = _shifted(pipe.scheduler, flow_shift)
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} takes several forwards a step; use a scheduler of order 1"
        )
    whole = scheduler.set_timesteps

    @functools.wraps(whole)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        drop = len(scheduler.timesteps) - min(left, len(scheduler.timesteps))
        scheduler.timesteps = scheduler.timesteps[drop:]
        scheduler.sigmas = scheduler.sigmas[drop:]
        scheduler.num_inference_steps = len(scheduler.timesteps)
        sigma, noised_to = float(scheduler.sigmas[0]), getattr(scheduler, _NOISED_TO, None)
        if noised_to is not None and not math.isclose(sigma, noised_to, rel_tol=1e-3):
            raise TilewiseError(
                f"{type(pipe).__name__} begins its second stage at noise level {sigma:.4f}, and the clip was noised to "
                f"{noised_to:.4f}: it shifts its schedule in a way that is not known here. Give flow_shift a number"
            )

    scheduler.set_timesteps = set_timesteps
    return scheduler


@contextmanager
def entered_at(pipe: Any, steps: int, strength: float, flow_shift: float | None) -> Iterator[Any]:
    """Run a block in which the pipeline has the scheduler of ``last_steps``, which is yielded; its own comes back afterwards.

    Raises as ``last_steps``.
    """
    scheduler = last_steps(pipe, steps, strength, flow_shift)
    with temporary_attribute(pipe, "scheduler", scheduler):
        yield scheduler


def noised(
    clean: torch.Tensor, scheduler: Any, asked: dict[str, Any], tokens: int, generator: torch.Generator,
    mu: Callable[[Any, int, dict[str, Any]], float] = interpolated_mu,
) -> torch.Tensor:  # fmt: skip
    """Clean latents at the noise level at which ``entered_at``'s scheduler begins. The noise is drawn on the CPU.

    asked: how the pipeline asks for timesteps, of `schedule_calls`. tokens: of the picture or clip, which schedulers with
    ``use_dynamic_shifting`` go by, as mu(config, tokens, asked) says.
    """
    asked = {**asked, "device": "cpu"}
    if "mu" in asked:
        asked["mu"] = mu(scheduler.config, tokens, asked)
    scheduler.set_timesteps(**asked)
    sigma = float(scheduler.sigmas[0])
    setattr(scheduler, _NOISED_TO, sigma)
    if scheduler.config.get("invert_sigmas"):  # they are shares of the clip, and rise
        sigma = 1 - sigma
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
    check_shift(flow_shift)
    fixed = {"use_dynamic_shifting": False} if config.get("use_dynamic_shifting") else {}  # by the size of the picture
    return type(scheduler).from_config(config, **{names[0]: float(flow_shift), **fixed})
