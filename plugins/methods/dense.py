"""``dense``: full attention in every layer and step: the yardstick, with the same accounting as every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.methods.base import Method, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """Stock attention, counted and timed by ``summary`` but not changed."""

    name: ClassVar[str] = "dense"

    def layout(self, grid: Grid) -> Layout | None:
        return None
