"""``dhsa``: chunks of any length, cut where the keys change (dynamic hierarchical sparse attention, arXiv 2510.24606).

    cut between blocks j and j + 1    where cos(k̄ⱼ, k̄ⱼ₊₁) is among the ⌊cuts · (N − 1)⌉ lowest of the head
    Q_I = √n_I · mean of the queries of chunk I           K_J = √n_J · mean of the keys of chunk J
    score[i, j] = scale · Q_I·K_J                         i in I, j in J

and each query block keeps the blocks with the best scores, those of a chunk in their order. √n lets long chunks count for more
than their mean, and less than their sum. The paper finds the cuts by a small trained network; this is its training-free stand-in.
Chunks are runs of whole blocks in the token order, and queries are cut where their keys are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.mean_map import mean_map
from tilewise.plugins.methods.dynamic.options import is_number
from tilewise.plugins.methods.dynamic.selection import select


@register
@dataclass(frozen=True)
class DHSA(DensityMethod):
    """Scores chunks of several blocks, cut where the keys change, and keeps the best.

    Args:
        cuts: share of the places between blocks at which chunks end, in (0, 1]; 1: each block is a chunk.

    Raises:
        ConfigError: for values that cannot be.
    """

    cuts: float = 0.5

    name: ClassVar[str] = "dhsa"
    source: ClassVar[str] = "DHSA, arXiv 2510.24606"
    use: ClassVar[str] = "scenes of large even regions, which a chunk covers at once"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.cuts) and 0 < self.cuts <= 1):
            raise ConfigError(f"dhsa: cuts must be in (0, 1], got {self.cuts!r}")

    def refuses_window(self) -> str | None:
        return "its chunks are of one sequence, and not of a KV cache beside it"

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        H, rows = query.shape[2], layout.block_table(query.device)[1]
        keys = per_query_head(means.keys.mean, H)  # (B, H, N, D)
        chunk = chunks(keys, self.cuts)
        queries, keys = (chunk_sums(x, rows, chunk) for x in (means.query.transpose(1, 2), keys))
        scores = scale * (queries @ keys.transpose(2, 3))  # of chunks: (B, H, N, N), those that are there first
        at = chunk[..., None].expand_as(scores), chunk[:, :, None].expand_as(scores)
        return means.draft(scores.gather(2, at[0]).gather(3, at[1]))

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert c.scores is not None and self.density is not None
        scores = c.scores.masked_fill(c.logits == -torch.inf, -torch.inf)
        return select("rows", scores, c.always, c.key_rows, density=c.density_of_rows(self.density))


def chunks(keys: torch.Tensor, cuts: float) -> torch.Tensor:
    """(B, H, N) int64: number of the chunk of each block, from its mean keys (B, H, N, D)."""
    chunk = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    count = round(cuts * (keys.shape[2] - 1))
    if count:
        alike = cosine_similarity(keys[:, :, :-1], keys[:, :, 1:], dim=-1)
        chunk.scatter_(-1, alike.argsort(dim=-1, stable=True)[..., :count] + 1, 1)
    return chunk.cumsum(-1)


def chunk_sums(means: torch.Tensor, rows: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D): √n · mean of each chunk, in place of its number; 0 where there is none. means: (B, H, N, D) of blocks."""
    weight = rows.to(means.dtype)
    sums = torch.zeros_like(means).scatter_add_(2, chunk[..., None].expand_as(means), means * weight[:, None])
    tokens = torch.zeros(chunk.shape, dtype=means.dtype, device=means.device)
    tokens = tokens.scatter_add_(2, chunk, weight.expand_as(tokens))
    return sums / tokens.clamp_min(1).sqrt()[..., None]
