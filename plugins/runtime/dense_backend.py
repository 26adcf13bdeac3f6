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
from tilewise.kernels.attention.dispatch_8bit import (
    block_sparse_attention_8bit,
    takes_hopper_8bit,
    unsupported_8bit,
)
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.plugins.diffusers_compat import is_default_backend
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.runtime.attention_request import AttentionRequest

MIN_TOKENS = 4096  # shorter sequences leave a GPU half empty either way
MAX_TOKENS = 262_144  # a plan lists every pair of blocks: 32 MiB here, four times as much at twice the length
HOPPER: Backend = next(backend for backend in BACKENDS if backend.name == "gluon")


def takes(request: AttentionRequest, *, window: bool = False) -> bool:
    """Whether a dense attention call is plain self-attention on a Hopper GPU, of a length that pays, for which nobody chose
    another backend. Whether the kernel takes the tensors is for ``attend`` to find out, and what its mask does for the caller.

    window: there may be more keys than queries, of a KV cache."""
    query, key, value = request.query, request.key, request.value
    tokens, keys = query.shape[1], key.shape[1]
    plain = not request.dropout_p and not request.is_causal and request.parallel_config is None
    if not plain or not MIN_TOKENS <= keys <= MAX_TOKENS or key.shape != value.shape:
        return False
    if keys != tokens and not (window and tokens <= keys):
        return False
    same = query.dtype == key.dtype == value.dtype and query.shape[0] == key.shape[0]
    same = same and query.shape[2] % key.shape[2] == 0 and all(x.stride(3) == 1 for x in (query, key, value))
    return same and HOPPER.unavailable(query.device) is None and is_default_backend(request.backend)


def attend(
    groups: list[Group],
    request: AttentionRequest,
    scale: float | None,
    plan_of: Callable[[int, torch.device], BlockPlan],
    precision: str | None = None,
) -> torch.Tensor | str:
    """Each group of samples over the tokens that it keeps, (B, S, H, D), with 0 for the others; or why the kernel does not take
    the tensors.

    plan_of: gives the plan of dense attention over so many tokens, on a device. precision: "int8" or "fp8"; None: 16 bits.
    """
    query = request.query
    taken = [group.take(query, request.key, request.value) for group in groups]
    plans = [plan_of(part[0].shape[1], query.device) for part in taken]
    for qkv, plan in zip(taken, plans, strict=True):
        if precision is None:
            why = HOPPER.unsupported(*qkv, plan)
        else:
            why = unsupported_8bit(qkv[0], plan) or (takes_hopper_8bit(*qkv[:2], plan) if qkv[0].is_cuda else None)
        if why is not None:
            return why
    found = (_run(part, plan, scale, precision) for part, plan in zip(taken, plans, strict=True))
    if len(groups) == 1 and groups[0].tokens is None:
        return next(found)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for group, part in zip(groups, found, strict=True):
        group.put(out, part)
    return out


def _run(qkv: tuple[torch.Tensor, ...], plan: BlockPlan, scale: float | None, precision: Any) -> torch.Tensor:
    q, k, v = qkv
    if precision is None:
        return block_sparse_attention(q, k, v, plan, scale=scale, backend=HOPPER.name)
    out = block_sparse_attention_8bit(q, k, v, plan, precision=precision, scale=scale)
    assert isinstance(out, torch.Tensor)
    return out


def not_in_8_bits(request: AttentionRequest) -> str | None:
    """Why a dense call does not run in 8 bits, whatever its mask and the size of its heads, or None.

    In the Hopper kernel alone: others are not known to be faster than dense attention in 16 bits.
    """
    query, keys = request.query, request.key.shape[1]
    if HOPPER.unavailable(query.device) is not None:
        return "needs a Hopper GPU"
    if query.shape[1] != keys:
        return f"{query.shape[1]} queries and {keys} keys are no self-attention"
    if not MIN_TOKENS <= keys <= MAX_TOKENS:
        return f"{keys} tokens, not {MIN_TOKENS} to {MAX_TOKENS}"
    return None if takes(request) else "the call is causal, has dropout, or another backend was chosen for it"


def attend_window(
    request: AttentionRequest, plan_of: Callable[[int, torch.device, int], BlockPlan]
) -> torch.Tensor | None:
    """A chunk's queries over all keys of a KV cache's window; None where the kernel does not take the tensors."""
    query, key, value = request.qkv
    plan = plan_of(query.shape[1], query.device, key.shape[1])
    if HOPPER.unsupported(query, key, value, plan) is not None:
        return None
    return block_sparse_attention(query, key, value, plan, scale=request.scale, backend=HOPPER.name)
