"""How many steps of a run a step cache would reuse, where that does not depend on what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewise.plugins.step_caches.options import MagCache, PyramidAttention, StepCache, TaylorSeer
from tilewise.plugins.step_caches.support import attention_kinds
from tilewise.plugins.text_format import counted


@dataclass(frozen=True)
class PlannedStep:
    """A step of a run. runs: whether the method runs there. timestep: as the scheduler counts; None: not known."""

    index: int
    total: int
    runs: bool
    timestep: float | None = None


def foretell(
    cache: StepCache,
    runs_at: Callable[[int, int], bool],
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    first: int,
    total: int,
    timesteps: torch.Tensor | None,
) -> tuple[int | None, list[str]]:
    """(steps that are reused, what to say of it) in a run over steps ``first`` … ``total`` − 1; None: only the run decides.

    runs_at: whether the method runs at step i of n. timesteps: (total,), None: not known.
    """
    values: list[float | None] = [None] * total if timesteps is None else [float(t) for t in timesteps]
    steps = [PlannedStep(i, total, runs_at(i, total), values[i]) for i in range(first, total)]
    shares = _shares(pipe, denoisers, steps)
    name = cache.name
    border = next((step.index for step, last in zip(steps[1:], steps, strict=False) if step.runs != last.runs), None)
    told = [] if border is None else [f"cache {name}: step {border} reuses nothing, as the method begins or ends there"]
    found = None
    if shares is not None:
        each = [reused_steps(cache, share, attention_kinds(denoisers[which])) for which, share in shares.items()]
        found = None if any(n is None for n in each) else sum(n or 0 for n in each)
    if found is None:
        why = "the activations" if shares is not None else "which denoiser runs when"
        return None, [f"cache {name}: how many of {total - first} steps are reused depends on {why}", *told]
    if not found and not (isinstance(cache, MagCache) and cache.calibrate):
        told.append(
            f"cache {name} reuses nothing in {counted(total - first, 'step')}: give more steps, or leave it out"
        )
    shifted = isinstance(cache, PyramidAttention) and _shifts(pipe)
    about = "about " if shifted else ""
    return found, [f"cache {name}: {about}{found} of {total - first} steps reused", *told]


def _shifts(pipe: Any) -> bool:
    """Whether a pipeline's timesteps depend on the size of the picture."""
    config: Any = getattr(getattr(pipe, "scheduler", None), "config", None)
    return bool(config is not None and config.get("use_dynamic_shifting"))


def _shares(
    pipe: Any, denoisers: Mapping[str, nn.Module], steps: Sequence[PlannedStep]
) -> dict[str, list[PlannedStep]] | None:
    """The steps of each denoiser: of two, Wan 2.2's by its ``boundary_ratio``; None where it is not known."""
    if len(denoisers) == 1:
        return {name: list(steps) for name in denoisers}
    config: Any = getattr(pipe, "config", None)
    ratio = None if config is None else config.get("boundary_ratio")
    if ratio is None or list(denoisers) != ["transformer", "transformer_2"]:
        return None
    boundary = ratio * pipe.scheduler.config.num_train_timesteps
    first = [step for step in steps if (step.timestep or 0.0) >= boundary]
    return {"transformer": first, "transformer_2": [step for step in steps if step not in first]}


def reused_steps(cache: StepCache, steps: Sequence[PlannedStep], kinds: Sequence[str] = ("spatial",)) -> int | None:
    """Steps at which anything is reused, among those of one denoiser; None where only the run decides.

    kinds: of attention layers that the denoiser has: "spatial", "temporal", "cross".
    """
    if isinstance(cache, TaylorSeer):
        return sum(map(sum, _parts(steps, lambda part, first: _taylor(cache, len(part), first))))
    if isinstance(cache, MagCache):
        return sum(map(sum, _parts(steps, lambda part, first: _mag(cache, part))))
    if isinstance(cache, PyramidAttention) and all(step.timestep is not None for step in steps):
        return sum(map(sum, _parts(steps, lambda part, first: _pyramid(cache, part, kinds))))
    return None


def _parts(steps: Sequence[PlannedStep], count: Callable[[Sequence[PlannedStep], int], list[bool]]) -> list[list[bool]]:
    """``count`` of each part of the run in which the method runs, or does not: at its borders nothing is kept."""
    found = []
    first = 0
    for at in range(1, len(steps) + 1) if steps else ():
        if at == len(steps) or steps[at].runs != steps[first].runs:
            found.append(count(steps[first:at], first))
            first = at
    return found


def _taylor(cache: TaylorSeer, steps: int, first: int) -> list[bool]:
    after = cache.disable_cache_after_step
    last = steps if after is None else max(after - first, 0)
    begin = cache.disable_cache_before_step
    return [begin <= step < last and (step - begin - 1) % cache.cache_interval != 0 for step in range(steps)]


def _mag(cache: MagCache, steps: Sequence[PlannedStep]) -> list[bool]:
    if cache.calibrate:
        return [False] * len(steps)
    total = cache.num_inference_steps or steps[0].total
    ratios = [float(ratio) for ratio in cache.for_steps(total).mag_ratios]
    retained = int(cache.retention_ratio * total + 0.5)
    reused: list[bool] = []
    ratio, error, skipped = 1.0, 0.0, 0
    for number, step in enumerate(steps):
        skips = False
        if step.index >= retained:
            ratio *= ratios[step.index] if step.index < len(ratios) else 1.0
            skipped += 1
            error += abs(1 - ratio)
            skips = number > 0 and error <= cache.threshold and skipped <= cache.max_skip_steps
            if not skips:
                ratio, error, skipped = 1.0, 0.0, 0
        reused.append(skips)
    return reused


def _pyramid(cache: PyramidAttention, steps: Sequence[PlannedStep], kinds: Sequence[str]) -> list[bool]:
    ranges = [
        (every, *getattr(cache, f"{kind}_attention_timestep_skip_range"))
        for kind in kinds
        if (every := getattr(cache, f"{kind}_attention_block_skip_range")) is not None
    ]
    return [
        any(low < (step.timestep or 0.0) < high and number % every != 0 for every, low, high in ranges)
        for number, step in enumerate(steps)
    ]
