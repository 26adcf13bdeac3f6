"""For tests of methods that choose key blocks: random calls, and which blocks a plan chose."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.methods.base import DynamicMethod, Planned

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(
    grid: Grid, batch: int = 2, heads: int = 4, key_heads: int = 2, dim: int = 16, seed: int = 0, size: float = 2.0
) -> QKV:
    """Random queries (B, S, H, D), keys and values (B, S, Hk, D)."""
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(batch, grid.tokens, heads, dim, generator=generator)
    k, v = (torch.randn(batch, grid.tokens, key_heads, dim, generator=generator) for _ in range(2))
    return q, k, v


def planned(
    method: DynamicMethod,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    memory: dict[str, Any] | None = None,
    tick: int = 0,
) -> Planned:
    return method.plan_call(layout, q, k, v, q.shape[-1] ** -0.5, {} if memory is None else memory, tick)


def blocks_of(layout: Layout, plan: BlockPlan, heads: int) -> torch.Tensor:
    """(P, heads, N, N) bool from the lists of a plan without partial blocks."""
    P, G, N, _ = plan.index.shape
    kept = torch.zeros(P, G, N, N, dtype=torch.bool)
    for p in range(P):
        for g in range(G):
            for i in range(N):
                kept[p, g, i, plan.index[p, g, i, : plan.ends[p, g, i, 2]].long()] = True
    return kept.expand(P, heads, N, N)
