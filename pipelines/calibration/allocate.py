"""A budget of token pairs, divided among heads: the multiple-choice knapsack problem, by its Lagrangian.

Each item (a head of a layer in a part of the run) takes one of n levels, with costs and errors of its own:

    minimise  Σ error[i, level_i]   subject to  Σ cost[i, level_i] ≤ budget

On the lower convex hull of an item's (cost, error) points, each step to the next point takes away some error for some cost.
Steps of all items are taken by falling gain, error ÷ cost, until the next does not fit. That is the best plan there is for what
it costs (Sinha and Zoltners 1979); what is left of the budget is less than one step, and goes to single items where it fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tilewise.plugins.errors import ConfigError


def allocate(cost: NDArray[np.float64], error: NDArray[np.float64], budget: float) -> NDArray[np.int64]:
    """The level of each item.

    Args:
        cost: (items, levels), rising in each row. error: the same shape, not negative.
        budget: what all may cost together.

    Returns:
        (items,) int64.

    Raises:
        ConfigError: the lowest levels cost more than the budget.
    """
    if cost.shape != error.shape or cost.ndim != 2:
        raise ValueError(f"allocate: cost {cost.shape} and error {error.shape} must both be (items, levels)")
    everything, least = float(cost[:, -1].sum()), float(cost[:, 0].sum())
    if least > budget * (1 + 1e-9):
        raise ConfigError(
            f"calibrate: a budget of {budget / everything:.3f} is below {least / everything:.3f}, what is kept in any case; "
            "raise --budget, or keep fewer steps dense"
        )
    steps = sorted(
        (step for item in range(len(cost)) for step in _hull_steps(item, cost[item], error[item])),
        key=lambda step: -step[0],
    )
    level, left = np.zeros(len(cost), dtype=np.int64), budget * (1 + 1e-9) - least
    stopped: set[int] = set()
    for _, item, up in steps:
        more = float(cost[item, up] - cost[item, level[item]])
        if item in stopped or more > left:  # later steps of this item build on this one
            stopped.add(item)
            continue
        level[item], left = up, left - more
    return level


def _hull_steps(item: int, cost: NDArray[np.float64], error: NDArray[np.float64]) -> Sequence[tuple[float, int, int]]:
    """(gain, item, level) of each step along the lower convex hull of an item's points, by falling gain."""
    found, at, last = [], 0, len(cost) - 1
    while at < last:
        saved = error[at] - error[at + 1 :]
        gain = saved / np.maximum(cost[at + 1 :] - cost[at], 1e-300)
        best = int(gain.argmax())
        if saved[best] <= 0:
            break
        found.append((float(gain[best]), item, at := at + 1 + best))
    return found
