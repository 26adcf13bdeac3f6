"""``hyper``: queries and keys in the order of a hash that like vectors share (HyperAttention, arXiv 2310.05869, sortLSH).

    bit_p[x]    = x · plane_p > 0                     planes: ``bits`` random directions, the same for queries and keys
    label[x]    = place of (bit_1, bit_2, …) in the Gray code, in which neighbours differ by one bit
    order       queries and keys by their label
    kept[i, j]  : the blocks j nearest to i in the order, as many as ``density`` says

so that what is kept is a band along the diagonal. Of the rest the paper samples columns; here summary rows stand for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.mean_map import mean_map
from tilewise.plugins.methods.dynamic.options import whole_number
from tilewise.plugins.methods.dynamic.reordered import Labels, ReorderedMethod, band
from tilewise.plugins.methods.dynamic.selection import select

MOST_BITS = 30


@register
@dataclass(frozen=True)
class Hyper(ReorderedMethod, DensityMethod):
    """Brings queries and keys into the order of a hash, and keeps a band along the diagonal.

    Args:
        bits: directions of the hash, 1 … 30; the paper's code has 7.
        seed: of the directions.

    Raises:
        ConfigError: for values that cannot be.
    """

    bits: int = 7
    seed: int = 0

    name: ClassVar[str] = "hyper"
    source: ClassVar[str] = "HyperAttention, arXiv 2310.05869"
    use: ClassVar[str] = "comparing a hash, the cheapest look at the content, with scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self, "bits", 1)
        whole_number(self, "seed", 0)
        if self.bits > MOST_BITS:
            raise ConfigError(f"hyper: bits must be at most {MOST_BITS}, got {self.bits}")

    def labels(self, layout: Layout, query: torch.Tensor, key: torch.Tensor, memory: dict[str, Any]) -> Labels:
        def make() -> torch.Tensor:
            generator = torch.Generator().manual_seed(self.seed)
            with torch.inference_mode(False):
                return torch.randn(query.shape[3], self.bits, generator=generator).to(query.device)

        planes = layout.cached(("hyper", self.seed, self.bits, query.shape[3], query.device), make)
        return hashed(query, planes), hashed(key, planes)

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        return means.draft(band(layout, query.device).expand_as(means.scores))

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None and self.density is not None
        return select("rows", c.scores, c.always, c.key_rows, density=c.density_of_rows(self.density))


def hashed(x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """(B, H, S) int64: labels of x (B, S, H, D)."""
    bits = (x.float() @ planes > 0).long()
    code = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
    place = code
    for shift in (16, 8, 4, 2, 1):  # the inverse of n ^ (n >> 1)
        place = place ^ (place >> shift)
    return place.transpose(1, 2)
