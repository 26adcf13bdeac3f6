"""A budget divided among heads: never above it, and within one step of the best plan there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tilewise.pipelines.calibration.allocate import allocate
from tilewise.plugins.errors import ConfigError

DENSITIES = np.array([0.1, 0.3, 0.6, 1.0])


def best(cost: np.ndarray, error: np.ndarray, budget: float) -> float:
    """The least error of all plans within a budget."""
    items = range(len(cost))
    plans = itertools.product(range(cost.shape[1]), repeat=len(cost))
    fitting = (p for p in plans if sum(cost[i, p[i]] for i in items) <= budget)
    return min(sum(error[i, p[i]] for i in items) for p in fitting)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_within_a_step_of_the_best_plan(seed):
    rng = np.random.default_rng(seed)
    cost = np.tile(DENSITIES, (6, 1)) * rng.choice([1.0, 4.0], (6, 1))
    error = -np.sort(-rng.random((6, 4)) * rng.choice([0.01, 1.0, 10.0], (6, 1)), axis=1)  # falling, of any shape
    error[:, -1] = 0
    budget = rng.uniform(0.15, 0.95) * cost[:, -1].sum()
    level = allocate(cost, error, budget)
    taken = float(np.take_along_axis(cost, level[:, None], 1).sum())
    assert taken <= budget * (1 + 1e-8)
    found = float(np.take_along_axis(error, level[:, None], 1).sum())
    # What is left of the budget is less than one step of the hull, and costs no more than that step would have saved.
    assert found <= best(cost, error, budget) + (error[:, 0] - error[:, -1]).max() + 1e-12
    for same in range(4):  # one level for all
        if cost[:, same].sum() <= taken:
            assert found <= error[:, same].sum() + 1e-12


def test_a_known_best_plan_is_found_exactly():
    """Heads that need nothing, a part, and everything; and the budget of just that."""
    cost = np.tile(DENSITIES, (4, 1))
    error = np.array([[0.0, 0, 0, 0], [9, 0, 0, 0], [9, 8, 0, 0], [9, 9, 9, 0]])
    level = allocate(cost, error, 0.1 + 0.3 + 0.6 + 1.0)
    assert level.tolist() == [0, 1, 2, 3]


def test_what_is_kept_in_any_case_must_fit():
    cost = np.tile(DENSITIES, (3, 1))
    with pytest.raises(ConfigError, match=r"budget of 0\.050 is below 0\.100"):
        allocate(cost, np.zeros_like(cost), 0.05 * 3)
    assert allocate(cost, np.zeros_like(cost), 0.1 * 3).tolist() == [0, 0, 0]
