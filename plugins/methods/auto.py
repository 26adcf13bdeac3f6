"""``auto``: one budget for the whole model, of which each head gets what its own errors ask for.

Heads differ: some attend to everything, some to almost nothing. Here each call measures on a few of its queries how large the
error of each head would be at several densities, and by several rankings of the key blocks (sampled_errors.py, head_rankings.py).
Each head gets a density such that all layers and steps together keep the budget (head_budget.py), and the ranking that is best
there. The map of blocks is that of ``draft``, with queries drafted by themselves.

``tilewise calibrate`` measures the same beforehand, into a file; this needs none, and goes by the clip that is being made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Planned, register
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.dynamic.always_keep import kept_by_rows
from tilewise.plugins.methods.dynamic.head_budget import HeadBudget, LayerGains, hull_gains
from tilewise.plugins.methods.dynamic.head_rankings import RANKINGS, rank_by_head
from tilewise.plugins.methods.dynamic.map_method import Candidates
from tilewise.plugins.methods.dynamic.options import DEFAULT_DENSITY
from tilewise.plugins.methods.dynamic.sampled_errors import sampled_errors
from tilewise.plugins.methods.dynamic.selection import select
from tilewise.plugins.methods.dynamic.tiles import MIN_TOKENS, Triple
from tilewise.plugins.methods.head_part import HeadPart, some_heads
from tilewise.plugins.models.common.family import AttentionLayer

LEVELS = (0.01, 0.02, 0.035, 0.055, 0.08, 0.12, 0.17, 0.24, 0.33, 0.45, 0.65, 1.0)  # densities that a head may have
EVERY = 4


@register
@dataclass(frozen=True)
class Auto(DynamicMethod):
    """A density for each head, found while the clip is made.

    Args:
        density: fraction of token pairs to keep, in (0, 1], text included: of all heads, layers and sparse steps together.
        every: denoising steps from one measurement to the next; between them a head stays at what was measured.
        tile, always, probe, min_tokens: see ``BlockSelectionMethod``.

    Raises:
        ConfigError: for values that cannot be.
    """

    density: float = DEFAULT_DENSITY
    every: int = EVERY
    tile: Triple | None = None
    always: tuple[str, ...] = ("self",)
    probe: int = 0
    min_tokens: int | None = None

    name: ClassVar[str] = "auto"
    source: ClassVar[str] = "this project"
    use: ClassVar[str] = "the clip nearest to dense at a density"

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ConfigError(f"auto: every must be a whole number of steps, at least 1, got {self.every!r}")
        if self.density is None:
            raise ConfigError("auto: density must be in (0, 1], got None")
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "every"}
        try:
            base = Draft(**own, each=True)
        except ConfigError as error:
            raise ConfigError(str(error).replace("draft: ", "auto: ", 1)) from error
        object.__setattr__(self, "tile", base.tile)
        object.__setattr__(self, "always", base.always)
        object.__setattr__(self, "_base", base)

    @property
    def base(self) -> Draft:
        """What chooses key blocks at the density of a head."""
        found: Draft = self.__dict__["_base"]
        return found

    # ── before anything runs ─────────────────────────────────────────────────────────────────────────────────────

    def layout(self, grid: Grid) -> Layout:
        """The token order.

        Raises:
            ConfigError: the blocks that are always kept take more than the budget.
        """
        layout = self.base.layout(grid)
        fewest = MIN_TOKENS["cpu"] if self.min_tokens is None else self.min_tokens
        least = self._costs(layout)[0]
        if grid.tokens >= fewest and least > self.density:
            raise ConfigError(
                f"auto: a density of {self.density} of {grid.tokens} tokens is below {least:.4f}, what is kept in any case: "
                f"{LEVELS[0]} by each head, and in blocks of {layout.tile} always {', '.join(self.always) or 'one block'}"
                f"{' and text' if grid.text else ''}. Raise the density, or use smaller tiles"
            )
        return layout

    @property
    def keeps_memory(self) -> bool:
        return True

    @property
    def remembers_heads(self) -> bool:
        return False  # a budget is of all heads of all layers

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        return self.density

    def expected_cost(self, layout: Layout, heads: int) -> float:
        return self.base.expected_cost(layout, heads)

    def refuses_call(self, layout: Layout) -> str | None:
        return self.base.refuses_call(layout)

    def refuses_window(self) -> str | None:
        return "auto divides its budget over the steps of a whole clip, and not over the window of a KV cache"

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        why = self.base.stays_dense(tokens, device)
        return None if why is None else why.replace("draft", "auto")

    def describe(self, layout: Layout) -> dict[str, Any]:
        return {"density": self.density, "divided among": "all heads, layers and sparse steps", "every": self.every}

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

    def in_run(
        self, layer: AttentionLayer, shared: Callable[[], dict[str, Any]], part: HeadPart | None = None
    ) -> DynamicMethod:
        return _InRun(self, layer, shared(), part)

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
        layer: AttentionLayer | None = None,
        part: HeadPart | None = None,
    ) -> Planned:
        """Without a run, the budget is divided among the heads of this call.

        part: which heads of the layer it is over, if not all; processes that have the others divide the same budget alike.
        """
        maps = self.base.maps_of(layout, query, key, value, scale)
        budget: HeadBudget = memory.setdefault("budget", HeadBudget(self.density))
        name = "" if layer is None else layer.name
        budget.begin(tick)
        levels, costs = self._on_device(layout, query.device)
        if tick % self.every == 0 or not budget.knows(name):
            module = None if layer is None else layer.module
            errors = sampled_errors(maps, (query, key, value), scale, LEVELS, RANKINGS, module, part=part)
            pairs, best = layout.grid.tokens**2, errors.min(2)
            gains, rankings = hull_gains(costs, best.values) / pairs, best.indices
            if part is not None:
                gains, rankings = part.whole(gains), part.whole(rankings)
            budget.tell(name, LayerGains(gains, costs.diff() * pairs, self._costs(layout)[0], pairs, rankings))
        level, ranking = budget.choices(name)
        if part is not None:
            level, ranking = (some_heads(x, part.own, 1) for x in (level, ranking))

        def choose(c: Candidates) -> torch.Tensor:
            return select("rows", rank_by_head(c, ranking), c.always, c.key_rows, density=levels[level])

        planned = self.base.planned(maps, (query, key), scale, choose, {}, tick)
        assert planned.plan.head_density is not None
        kept = planned.plan.head_density
        budget.spend(name, kept if part is None else part.whole(kept))
        return planned

    def _costs(self, layout: Layout) -> tuple[float, ...]:
        """What each level keeps of a head's pairs, text included."""
        return layout.cached(("costs of levels", self.always), lambda: kept_by_rows(layout, self.always, LEVELS))

    def _on_device(self, layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(levels,) float32, and their costs, (levels,) float64."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            costs = torch.tensor(self._costs(layout), dtype=torch.float64)
            with torch.inference_mode(False):
                return torch.tensor(LEVELS, device=device), costs.to(device)

        return layout.cached(("levels", self.always, device), make)


@dataclass(frozen=True)
class _InRun(DynamicMethod):
    """``auto`` of a layer within a run, whose budget all layers share."""

    method: Auto
    layer: AttentionLayer
    run: dict[str, Any]
    part: HeadPart | None = None

    name: ClassVar[str] = "auto"

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        return self.method.plan_call(layout, query, key, value, scale, self.run, tick, layer=self.layer, part=self.part)
