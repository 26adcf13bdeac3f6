"""``dense``: full attention in every layer and step: the yardstick, with the same accounting as every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.methods.base import Method, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """Attention over every token, with fused kernels around it where the model's family has them."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "this project"
    use: ClassVar[str] = "exact attention in a faster step"

    def layout(self, grid: Grid) -> Layout | None:
        return None
