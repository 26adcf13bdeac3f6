"""Calibration: what several runs told of each head becomes a plan for a budget, and the config that patches by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewise.pipelines.calibration.allocate import allocate
from tilewise.pipelines.calibration.records import DenoiserProfile, RunProfile, Schedule
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.calibrated import DIGITS, Calibrated, HeadTable
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 1.0)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A finished calibration.

    config: what ``patch`` takes. density: kept pairs ÷ all pairs of a whole run, dense steps included. error: of the output of an
    attention layer in a sparse step, relative, root mean square over layers and steps; uniform: the same of one density for all
    heads that keeps as many pairs.
    """

    config: Config
    density: float
    error: float
    uniform: float


def calibrate(
    runs: Sequence[RunProfile],
    base: BlockSelectionMethod,
    schedule: Schedule,
    *,
    budget: float,
    densities: Sequence[float] = DENSITIES,
    made: dict[str, Any] | None = None,
) -> Calibration:
    """The plan for a budget.

    Args:
        runs: of `profile_run`, all with this method, schedule and densities.
        budget: pairs kept over all steps, layers and heads of a run ÷ all pairs, in (0, 1].
        made: what is to be said of how it was made.

    Raises:
        ConfigError: a budget out of range, or below what is kept in any case.
    """
    sparse = sparse_budget(budget, schedule)
    denoisers = _joined(runs)
    items: list[_Layer] = []
    for number, found in enumerate(denoisers):
        for part in range(schedule.count):
            if not (steps := runs[0].steps_of(number, part, schedule)):
                continue
            for layer in sorted({layer for _, layer in found.errors}):
                nearest = found.nearest(part, layer)
                assert nearest is not None
                error = found.errors[nearest, layer].numpy() / max(found.output[nearest, layer], 1e-300)
                items.append(_Layer(number, part, layer, error, found.kept[nearest, layer].numpy(), steps))
    cost = np.concatenate([item.steps * item.kept for item in items])
    error = np.concatenate([item.steps * item.error for item in items])
    whole = float(cost[:, -1].sum())
    level = allocate(cost, error, sparse * whole)
    kept = float(np.take_along_axis(cost, level[:, None], 1).sum()) / whole
    squared = float(np.take_along_axis(error, level[:, None], 1).sum())
    layers = sum(item.steps for item in items)
    tables = _tables(denoisers, items, level, schedule.count, len(densities))
    method = Calibrated(base, tuple(densities), _noise(runs[0].noise, schedule), tables, made)
    first = schedule.first / schedule.steps
    return Calibration(
        Config(method, steps=(first, 1.0)),
        first + (1 - first) * kept,
        (squared / layers) ** 0.5,
        (_at_one_density(cost.sum(0) / whole, error, kept) / layers) ** 0.5,
    )


def sparse_budget(budget: float, schedule: Schedule) -> float:
    """What is left of a budget for the sparse steps, as a share of their pairs.

    Raises:
        ConfigError: nothing, or the budget is out of range.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"calibrate: the budget must be in (0, 1], got {budget}")
    first = schedule.first / schedule.steps
    if budget <= first:
        raise ConfigError(
            f"calibrate: the first {schedule.first} of {schedule.steps} steps stay dense and take {first:.3f} of all pairs, and "
            f"the budget is {budget}; raise the budget, or keep fewer steps dense"
        )
    return (budget - first) / (1 - first)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer in a part of the run. error: (heads, densities), relative and squared. kept: (heads, densities), token pairs of a
    call. steps: in which its denoiser runs there."""

    denoiser: int
    part: int
    layer: int
    error: NDArray[np.float64]
    kept: NDArray[np.float64]
    steps: int


def _joined(runs: Sequence[RunProfile]) -> list[DenoiserProfile]:
    """The sums over runs, by denoiser."""
    joined = [dataclasses.replace(found, errors={}, kept={}, output={}) for found in runs[0].denoisers]
    for run in runs:
        for into, found in zip(joined, run.denoisers, strict=True):
            for where, errors in found.errors.items():
                there = where in into.errors
                into.errors[where] = into.errors[where] + errors if there else errors
                into.kept[where] = into.kept[where] + found.kept[where] if there else found.kept[where]
                into.output[where] = into.output.get(where, 0.0) + found.output[where]
    return joined


def _noise(levels: Sequence[float], schedule: Schedule) -> tuple[float, ...]:
    """The noise levels between parts, rising: halfway between the last step of one and the first of the next."""
    borders = schedule.borders[1:-1]
    return tuple(round((levels[step - 1] + levels[step]) / 2, 6) for step in reversed(borders))


def _tables(
    denoisers: Sequence[DenoiserProfile], items: Sequence[_Layer], level: NDArray[np.int64], parts: int, densities: int
) -> tuple[HeadTable, ...]:
    """The levels of all items, which come in their order, as tables.

    A layer has in parts in which its denoiser did not run the levels of the nearest in which it did: other schedules may put it
    there. A layer that was not measured is dense: it runs dense anyway, as it is too short, or does not run at all.
    """
    chosen: dict[tuple[int, int], dict[int, str]] = {}  # (denoiser, layer): {part: digits}
    start = 0
    for item in items:
        heads = len(item.error)
        digits = "".join(DIGITS[n] for n in level[start : start + heads])
        chosen.setdefault((item.denoiser, item.layer), {})[item.part] = digits
        start += heads

    def digits_of(denoiser: int, layer: int, heads: int, part: int) -> str:
        found = chosen.get((denoiser, layer), {})
        dense = DIGITS[densities - 1] * heads
        return found[min(found, key=lambda there: abs(there - part))] if found else dense

    return tuple(
        HeadTable(
            profile.denoiser,
            tuple(  # from the lowest noise level
                tuple(digits_of(number, layer, heads, part) for layer, heads in enumerate(profile.denoiser.heads))
                for part in reversed(range(parts))
            ),
        )
        for number, profile in enumerate(denoisers)
    )


def _at_one_density(shares: NDArray[np.float64], error: NDArray[np.float64], kept: float) -> float:
    """The error of one density for all, between those that were measured, which kept ``shares``: their logarithms on a line."""
    sums = np.maximum(error.sum(0), 1e-300)
    sums[-1] = max(sums[-1], sums[-2] * 1e-3)  # 0 when dense, which a logarithm cannot be
    return float(np.exp(np.interp(np.log(kept), np.log(shares), np.log(sums))))
