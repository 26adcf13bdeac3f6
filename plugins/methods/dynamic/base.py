"""Methods that keep a density or a recall of what their map says: the best pairs, by one of the rules of selection.py.

A method on top of this is one file that gives ``draft``, the logits of its map (map_method.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.options import checked
from tilewise.plugins.methods.dynamic.selection import select

__all__ = ["BlockSelectionMethod", "DraftMap"]


@dataclass(frozen=True)
class BlockSelectionMethod(DensityMethod):
    """Options that such methods share; the others are ``DensityMethod``'s.

    Args:
        head_density: instead of ``density``: one density for each head of the layer; with select="rows".
        recall: instead: fraction of the attention mass to keep, in (0, 1], as the draft estimates it.
        safety: with ``recall``: by how much the draft may underestimate what is lost, ≥ 1; it aims at losing (1 − recall) ÷
            safety. With the default, 3, at least 95 % of the query blocks of the demo model reach a recall of 0.8, 0.9 or 0.95
            that is asked of ``draft``; with 1, their mean does.
        select: how pairs are chosen: "rows", "head", "topk" or "shared"; see ``selection.py``. "topk" needs a density.
        rank: what counts as best at a density: "mass", or "error", the error that skipping makes where compensation follows.
            Default: "error" if ``compensate``, else "mass". By a recall it is always mass.
        floor: fewest blocks of a row, ≥ 1.
        cap: most blocks of a row, for "rows"; None: no limit.

    Raises:
        ConfigError: for values outside those ranges, or more than one of density, head_density and recall.
    """

    head_density: tuple[float, ...] | None = None
    recall: float | None = None
    safety: float = 3.0
    select: str = "rows"
    rank: str | None = None
    floor: int = 1
    cap: int | None = None

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density", "head_density", "recall"),)
    per_head: ClassVar[bool] = True
    """Whether each head may have a density of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)

    def check(self, heads: int) -> None:
        super().check(heads)
        if self.head_density is not None and len(self.head_density) != heads:
            raise ConfigError(
                f"{self.name}: head_density has {len(self.head_density)} densities, but the layer has {heads} heads"
            )

    def head_costs(self) -> tuple[float, ...] | None:
        return self.head_density if self.within is None else None

    def of_heads(self, heads: Sequence[int]) -> Self:
        densities = None if self.head_density is None else tuple(self.head_density[head] for head in heads)
        return dataclasses.replace(super().of_heads(heads), head_density=densities)

    def refuses_some_heads(self) -> str | None:
        if self.select == "shared":
            return "select='shared' chooses among the pairs of all heads, and each rank has some; give another select"
        return super().refuses_some_heads()

    def target(self) -> dict[str, Any]:
        return {**super().target(), "select": self.select}

    def wanted_density(self) -> float:
        if self.head_density is not None:
            return math.fsum(self.head_density) / len(self.head_density)
        return super().wanted_density()

    @property
    def keeps_everything(self) -> bool:
        return super().keeps_everything or self.recall == 1

    @property
    def ranks_by_error(self) -> bool:
        """Whether skipped pairs are ranked by the error that they would make."""
        return self.recall is None and (self.compensates if self.rank is None else self.rank == "error")

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        target = None if self.recall is None else 1 - (1 - self.recall) / self.safety
        density = self._density_of_rows(c)
        return select(
            self.select, c.ranked, c.always, c.key_rows, density=density, recall=target, floor=self.floor, cap=self.cap,
            query_rows=c.rows,
        )  # fmt: skip

    def _density_of_rows(self, candidates: Candidates) -> float | torch.Tensor | None:
        """What the rows of the map are to keep: a density, or one for each head, (H,) float32; None: there is a recall."""
        heads, device = self.head_density, candidates.logits.device
        if heads is None:
            if self.density is None or self.select in ("head", "shared"):
                return self.density
            return candidates.density_of_rows(self.density)

        def make() -> torch.Tensor:
            with torch.inference_mode(False):
                return torch.tensor([candidates.density_of_rows(density) for density in heads], device=device)

        return candidates.layout.cached(("head density", heads, device), make)
