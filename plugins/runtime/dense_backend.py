"""Dense attention by our own kernel, where it is at least as fast as what PyTorch chooses: the steps and layers that a method
leaves dense, and ``patch(pipe, "dense")``.

The same kernel, given a plan in which every query sees every key. Keys that a mask hides from all, the padding of a prompt, are
left out, where PyTorch's fast kernels refuse a mask. Exact: the result differs from stock by rounding alone, but for tokens that
are hidden themselves, which nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.kernels.attention.dispatch import BACKENDS, Backend, block_sparse_attention
from tilewise.kernels.plans.block_plan import BlockPlan, dense_plan
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.plugins.diffusers_compat import is_default_backend
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.runtime.attention_call import part_of, put_part

MIN_TOKENS = 4096  # shorter sequences leave a GPU half empty either way
MAX_TOKENS = 262_144  # a plan lists every pair of blocks: 32 MiB here, four times as much at twice the length
HOPPER: Backend = next(backend for backend in BACKENDS if backend.name == "gluon")


def exact_plan(tokens: int, device: torch.device) -> BlockPlan:
    """Every query sees every key, in whatever order the tokens are."""
    return dense_plan(Layout(Grid(1, 1, tokens), (1, 1, tokens)), device)


def takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout_p: float,
    is_causal: bool,
    backend: Any,
    parallel_config: Any,
) -> bool:
    """Whether a dense attention call (tensors (B, S, H, D)) is plain self-attention on a Hopper GPU, of a length that pays, for
    which nobody chose another backend. Whether the kernel takes the tensors is for ``attend`` to find out, and what its mask does
    for the caller."""
    tokens = query.shape[1]
    plain = not dropout_p and not is_causal and parallel_config is None
    if not plain or not MIN_TOKENS <= tokens <= MAX_TOKENS or key.shape != value.shape or key.shape[1] != tokens:
        return False
    same = query.dtype == key.dtype == value.dtype and query.shape[0] == key.shape[0]
    same = same and query.shape[2] % key.shape[2] == 0 and all(x.stride(3) == 1 for x in (query, key, value))
    return same and HOPPER.missing(query.device) is None and is_default_backend(backend)


def attend(
    groups: list[Group],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    plan_of: Callable[[int, torch.device], BlockPlan],
) -> torch.Tensor | None:
    """Each group of samples over the tokens that it keeps, (B, S, H, D), with 0 for the others; None where the kernel does not
    take the tensors. plan_of: ``exact_plan`` or one that keeps its plans."""
    whole = query, key, value
    parts = [part_of(group, *whole) for group in groups]
    plans = [plan_of(part[0].shape[1], query.device) for part in parts]
    if any(HOPPER.misfit(*part, plan) is not None for part, plan in zip(parts, plans, strict=True)):
        return None
    found = (
        block_sparse_attention(*part, plan, scale=scale, backend=HOPPER.name)
        for part, plan in zip(parts, plans, strict=True)
    )
    if len(groups) == 1 and groups[0].tokens is None:
        return next(found)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for group, part in zip(groups, found, strict=True):
        put_part(out, group, part)
    return out
