"""How much of the token pairs a clip computes where it is sparse: its density and, where means stand for keys, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilewise.pipelines.generation.clip_metadata import cost_of

DENSITY, COST = "density where sparse", "cost, means counted too"


def shares(density: float, cost: float, name: str = DENSITY, cost_name: str = COST) -> list[tuple[str, float]]:
    """The shares that there are to show with their names: the cost only where it is another number."""
    found = [(name, density)]
    return found if f"{cost:.3f}" == f"{density:.3f}" else [*found, (cost_name, cost)]


def shares_words(run: Mapping[str, Any]) -> str:
    """The same in words, by the "run" part of a clip's metadata: "density 0.394, cost 0.436"."""
    return ", ".join(f"{name} {value:.3f}" for name, value in shares(run["density"], cost_of(run), "density", "cost"))
