"""``duo``: some heads see everything, the others what is near and the beginning (DuoAttention, arXiv 2410.10819).

    retrieval heads    every key block
    local heads        of a share of the key blocks, half (at most) those of the first ``sink`` latent frames that are nearest to
                       the query block, and else those nearest to it in time, height and width

Which heads are which: those that you name (``heads``), or in each call those whose local blocks hold the least of the attention
mass that the map of means expects. The paper optimizes a gate for each head on synthetic texts; this needs no training. By a
``density``, half of it goes to retrieval heads, as far as whole heads go, and the rest to local blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, register
from tilewise.plugins.methods.dynamic.always_keep import nearness
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates
from tilewise.plugins.methods.dynamic.mean_map import MeanDraft
from tilewise.plugins.methods.dynamic.options import is_number, whole_number
from tilewise.plugins.models.common.registry import family_of


@register
@dataclass(frozen=True)
class Duo(MeanDraft, DensityMethod):
    """Retrieval heads see everything, local heads their surroundings and the first latent frame.

    Args:
        retrieval: instead of ``density``: share of the heads of each layer that see everything, in [0, 1]; measured at each call.
        heads: instead of both: the numbers of those heads, for each layer of the denoiser (or once, for all layers).
        local: share of the key blocks that a local head sees, in (0, 1], with ``retrieval`` or ``heads``.
        sink: latent frames at the beginning that local heads see some of; 0: none.

    Raises:
        ConfigError: for values that cannot be, or numbers of heads that a layer does not have.
    """

    retrieval: float | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    local: float = 0.1
    sink: int = 1

    name: ClassVar[str] = "duo"
    source: ClassVar[str] = "DuoAttention, arXiv 2410.10819"
    use: ClassVar[str] = "models of which few heads look far; the same blocks at every step where heads are named"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density", "retrieval", "heads"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retrieval is not None and not (is_number(self.retrieval) and 0 <= self.retrieval <= 1):
            raise ConfigError(f"duo: retrieval must be a share of the heads in [0, 1], got {self.retrieval!r}")
        if not (is_number(self.local) and 0 < self.local <= 1):
            raise ConfigError(f"duo: local must be in (0, 1], got {self.local!r}")
        whole_number(self, "sink", 0)
        if self.heads is not None:
            object.__setattr__(self, "heads", _numbers(self.heads))

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        family = family_of(denoiser)
        if self.heads is not None and len(self.heads) > 1 and family is not None:
            layers = len(family.layers(denoiser))
            if len(self.heads) != layers:
                raise ConfigError(
                    f"duo: heads has numbers for {len(self.heads)} layers, but {type(denoiser).__name__} has {layers}; give one "
                    "tuple for each, or one for all"
                )
        return super().prepare(target, denoiser)

    def check(self, heads: int) -> None:
        super().check(heads)
        numbers = [n for layer in self.heads or () for n in layer]
        if any(n >= heads for n in numbers):
            raise ConfigError(f"duo: heads names head {max(numbers)}, but the layer has {heads}, numbered from 0")

    def refuses_some_heads(self) -> str | None:
        return "its retrieval heads are chosen among all heads of a layer, and each rank has some"

    def refuses_window(self) -> str | None:
        return "its nearest blocks are those of one grid, and not of a KV cache"

    def at(self, layer: int, noise: float | None) -> DynamicMethod:
        return self if self.heads is None or len(self.heads) == 1 else _of_layer(self, layer)

    def expected_density(self, layout: Layout, heads: int, window: Any = None) -> float:
        whole = super().expected_density(layout, heads)
        if self.density is not None:
            return whole
        named = [len(set(layer)) / heads for layer in self.heads or ()]
        share = sum(named) / len(named) if named else round((self.retrieval or 0) * heads) / heads
        return share + (1 - share) * max(1, round(self.local * layout.blocks)) / layout.blocks

    def _named(self, heads: int, device: torch.device) -> torch.Tensor:
        """(1, heads) bool: those that see everything."""
        assert self.heads is not None
        with torch.inference_mode(False):
            return torch.tensor([[head in self.heads[0] for head in range(heads)]], device=device)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        H, N = c.logits.shape[1], c.layout.blocks
        if self.density is not None:
            wanted = c.density_of_rows(self.density)
            full = min(int(wanted / 2 * H), H - 1)
            local = (wanted - full / H) / (1 - full / H)
        else:
            full, local = round((self.retrieval or 0) * H), self.local
        kept = local_blocks(c.layout, max(1, round(local * N)), self.sink, c.logits.device) | c.always
        if self.heads is not None:
            chosen = c.layout.cached(
                ("duo heads", self.heads[0], H, c.logits.device), lambda: self._named(H, c.logits.device)
            )
        else:
            mass = ((c.logits.softmax(-1) * kept).sum(-1) * c.rows).sum(-1)  # (B, H)
            chosen = mass.argsort(dim=-1, stable=True).argsort(dim=-1) < full
        return chosen[..., None, None] | kept.expand_as(c.logits)


def local_blocks(layout: Layout, count: int, sink: int, device: torch.device) -> torch.Tensor:
    """(N, N) bool: the ``count`` key blocks that a local head sees of each query block, text not counted."""

    def make() -> torch.Tensor:
        near = nearness(layout, torch.device("cpu"))
        first = (layout.block_tile[:, 0] * layout.tile[0] < sink) & ~layout.is_text
        # Places among the blocks of the first frames, and of those the best ones before all others.
        place = torch.where(first, near, layout.blocks).argsort(dim=-1, stable=True).argsort(dim=-1)
        taken = min(count // 2, int(first.sum()))
        order = torch.where(place < taken, place - layout.blocks, near)
        found = order.argsort(dim=-1, stable=True).argsort(dim=-1) < count
        with torch.inference_mode(False):
            return found.to(device)

    return layout.cached(("duo", count, sink, device), make)


@functools.lru_cache(maxsize=4096)
def _of_layer(method: Duo, layer: int) -> Duo:
    assert method.heads is not None
    return dataclasses.replace(method, heads=(method.heads[layer],))


def _numbers(given: Any) -> tuple[tuple[int, ...], ...]:
    whole = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if whole and all(isinstance(n, int) for n in given):
        given = (given,)
    if not whole or not all(
        isinstance(layer, Sequence)
        and not isinstance(layer, str)
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layer)
        for layer in given
    ):
        raise ConfigError(
            f"duo: heads must be numbers of heads for each layer, such as ((0, 3), (), (1,)), got {given!r}"
        )
    return tuple(tuple(layer) for layer in given)
