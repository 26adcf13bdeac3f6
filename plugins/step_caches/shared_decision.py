"""Step caches on a denoiser that several processes share: all of them must skip the same blocks.

``mag`` and ``pab`` go by the step. ``first-block`` compares what its first block
changed with what it changed before, in the mean over tokens: here over those of all processes,

    Σ |r − r₀| ÷ Σ |r₀|        r, r₀: (B, S, C), the change of the first block, now and when the others ran last
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tilewise.plugins.context_parallel.halves import halves_of
from tilewise.plugins.diffusers_compat import context_parallel
from tilewise.plugins.step_caches import diffusers_compat as compat
from tilewise.plugins.torch_compat import outside_graphs


def share_decisions(denoiser: nn.Module, hooks: list[Any]) -> None:
    """For the hooks of a cache that has just been put on a denoiser."""
    reference = weakref.ref(denoiser)
    for hook in hooks:
        compat.replace_decision(hook, functools.partial(_decide, reference))


@outside_graphs
def _decide(
    denoiser: Callable[[], nn.Module | None], hook: Any, stock: Callable[..., bool], change: torch.Tensor
) -> bool:
    """Whether the blocks after the first run. change: r, of this process's tokens and samples."""
    groups = _groups(denoiser())
    before, threshold = compat.last_change(hook)
    if not groups or before is None:
        return stock(change)
    sums = torch.stack([(change - before).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])
    for group in groups:
        dist.all_reduce(sums, group=group)
    moved, whole = sums.tolist()
    return bool(moved > threshold * whole)


def _groups(denoiser: Any) -> list[Any]:
    """Those with which this process shares the tokens and the batch of a forward."""
    at, halves = context_parallel(denoiser), halves_of(denoiser)
    found = [] if at is None else [at.group]
    return found if halves is None or not halves.in_batch else [*found, halves.group]
