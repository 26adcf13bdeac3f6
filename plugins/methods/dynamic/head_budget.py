"""One budget of token pairs for all heads of a model, divided while it runs: a knapsack by its Lagrangian, on the device.

Each head has an error and a cost at each level of density. On the lower convex hull of these points, going up to level l saves

    gain[l] = min over a < l of  max over b ≥ l of  (error[a] − error[b]) ÷ (cost[b] − cost[a])          per token pair

which falls with l. With one threshold λ for all heads, each takes the levels with gain ≥ λ; the λ at which all together cost the
budget makes the least error there is for it.

A layer has to choose before the next layers are seen. So λ is that of the gains which the step before left behind, of all layers,
and what was kept too much or too little until then is taken from this step or given to it. At the first step of a run each layer
divides the budget among its own heads, and what layers before it kept too much or too little counts likewise.

Samples of a batch have budgets of their own: a clip is the same whatever it is made with.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

LEAST_COST = 1e-7  # levels that differ by less cost the same
NEGLIGIBLE = 1e-7  # of a layer's output, squared: a tenth of what rounding it to bfloat16 makes


def hull_gains(cost: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """(…, levels − 1) float32, falling: what each further level saves, on the convex hull of a head's points.

    cost: (levels,), rising. error: (…, levels), relative to the layer's output and squared. Where it is not finite, nothing is
    gained: such a head stays at its lowest level, at which lists with queries or keys that are not finite keep everything anyway.
    """
    levels = len(cost)
    error = torch.where(error.isfinite().all(-1, keepdim=True) & (error > NEGLIGIBLE), error, 0.0)
    rise = cost[None, :] - cost[:, None]  # from a to b
    slope = (error[..., :, None] - error[..., None, :]) / rise.clamp_min(LEAST_COST).float()
    slope = slope.masked_fill(rise <= LEAST_COST, -torch.inf)
    best = slope.flip(-1).cummax(-1).values.flip(-1)[..., 1:]  # (…, a, up): of all b ≥ up
    # From a point that costs as much there is nothing to go up by.
    place = torch.arange(levels, device=cost.device)
    below = (place[:, None] < place[1:]) & (rise[:, -1:] > LEAST_COST)
    return best.masked_fill(~below | (best == -torch.inf), torch.inf).amin(-2).clamp_min(0)


def threshold(gains: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """(B,) float32: the λ at which the steps with gain ≥ λ cost most nearly ``budget``. Steps of one gain are taken together.

    gains: (B, n) float32. cost: (n,) float64, of each step. budget: (B,) float64, beyond what the lowest levels cost.
    """
    order = gains.argsort(1, descending=True)
    falling, spent = gains.gather(1, order), cost[order].cumsum(1)
    fits = (spent <= budget[:, None]).sum(1, keepdim=True)
    border = falling.gather(1, fits.clamp_max(gains.shape[1] - 1))  # of the first step that does not fit
    above, without = gains > border, torch.where(gains > border, cost, 0.0).sum(1)
    within = torch.where(gains >= border, cost, 0.0).sum(1)
    higher = gains.masked_fill(~above, torch.inf).amin(1)
    best = torch.where(within - budget <= budget - without, border[:, 0], higher)
    # A step of gain 0 is not taken, even if it could be paid.
    return torch.where(fits[:, 0] == gains.shape[1], 0.0, best).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LayerGains:
    """What a layer's heads gain, and pay, at each step up.

    gains: (B, H, levels − 1), per token pair. steps: (levels − 1,) float64, token pairs that each costs. least: share of the
    pairs that the lowest level keeps. pairs: of a head. rankings: (B, H, levels) int64, the best one at each level.
    """

    gains: torch.Tensor
    steps: torch.Tensor
    least: float
    pairs: int
    rankings: torch.Tensor


class HeadBudget:
    """The budget of a run, kept in its memory. density: kept ÷ all token pairs."""

    def __init__(self, density: float) -> None:
        self.density = density
        self._tick: int | None = None
        self._layers: dict[Hashable, LayerGains] = {}
        self._limit: torch.Tensor | None = None  # λ (B,) of this step
        self._balance: torch.Tensor | None = None  # (B,) token pairs that were paid for and not kept

    def begin(self, tick: int) -> None:
        """A call begins in a step. λ is found anew if it is the step's first."""
        if tick != self._tick and self._layers:
            self._limit = self._find(list(self._layers.values()), self._balance)
        self._tick = tick

    def knows(self, layer: Hashable) -> bool:
        """Whether the gains of a layer are known."""
        return layer in self._layers

    def tell(self, layer: Hashable, gains: LayerGains) -> None:
        """What a layer's heads gain, from now on."""
        self._layers[layer] = gains

    def choices(self, layer: Hashable) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H) int64: the level of each head, and its ranking there."""
        own = self._layers[layer]
        limit = self._find([own], self._balance) if self._limit is None else self._limit.to(own.gains.device)
        levels = (own.gains >= limit[:, None, None]).sum(-1)
        return levels, own.rankings.gather(2, levels[..., None])[..., 0]

    def spend(self, layer: Hashable, kept: torch.Tensor) -> None:
        """What a call kept: (B, H), a share of its pairs."""
        left = (self.density - kept.double()).sum(1) * self._layers[layer].pairs
        self._balance = left if self._balance is None else self._balance.to(left.device) + left

    def _find(self, layers: list[LayerGains], balance: torch.Tensor | None) -> torch.Tensor:
        """λ of these layers together."""
        device = layers[0].gains.device
        gains = torch.cat([layer.gains.to(device).flatten(1) for layer in layers], 1)
        cost = torch.cat([layer.steps.to(device).repeat(layer.gains.shape[1]) for layer in layers])
        budget = sum(layer.pairs * layer.gains.shape[1] * (self.density - layer.least) for layer in layers)
        left = torch.full_like(gains[:, 0], budget, dtype=torch.float64)
        return threshold(gains, cost, left if balance is None else left + balance.to(device))
