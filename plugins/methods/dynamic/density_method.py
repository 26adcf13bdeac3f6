"""Methods that keep a density of the token pairs, whatever the rule by which they choose them.

A method on top of this is one file that gives ``draft`` and ``choose`` (map_method.py). Where it can be asked for something else
than a density, that option stands in ``exclusive`` beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.dynamic.always_keep import tokens_always_kept
from tilewise.plugins.methods.dynamic.map_method import MapMethod
from tilewise.plugins.methods.dynamic.options import DEFAULT_DENSITY, fraction


@dataclass(frozen=True)
class DensityMethod(MapMethod):
    """The option of such methods; the others are ``MapMethod``'s.

    Args:
        density: fraction of token pairs to keep, in (0, 1], text included. Default 0.25 if nothing else is given. Over the
            window of a KV cache: of queries and all keys of the window; memory and sink are kept and count.

    Raises:
        ConfigError: for a value outside that range, or more than one option that says how much is kept.
    """

    density: float | None = None

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density",),)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.exclusive[0]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            choice = " or ".join([", ".join(names[:-1]), names[-1]])
            raise ConfigError(f"{self.name}: give {choice}, not both: each decides how much is kept")
        if not given:
            object.__setattr__(self, "density", DEFAULT_DENSITY)
        elif self.density is not None:
            fraction(self, "density")

    def target(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.exclusive[0] if getattr(self, name) is not None}

    @property
    def keeps_everything(self) -> bool:
        return self.density == 1

    def wanted_density(self) -> float:
        """What is to be kept; nan if only a call decides."""
        return math.nan if self.density is None else self.density

    @property
    def heads_alike(self) -> bool:
        return self.within is None and not math.isnan(self.wanted_density())

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        wanted, device = self.wanted_density(), torch.device("cpu")
        if math.isnan(wanted):
            return wanted
        bounds = self._bounds(layout, heads, device, window)
        found = wanted if bounds is None else min(wanted, bounds.plan.density)
        if window is None and bounds is not None:
            return found
        keys = layout if window is None else window.layout
        queries = layout.block_rows.double()
        least = queries @ tokens_always_kept(layout, self.always, window) / (queries.sum() * keys.block_rows.sum())
        return max(found, float(least))  # kept whatever the density
