"""Dense attention by our own kernel, where it is at least as fast as what PyTorch chooses: the steps and layers that a method
leaves dense, and ``patch(pipe, "dense")``.

The same kernel, given a plan in which every query sees every key. Keys that a mask hides from all, the padding of a prompt, are
left out, where PyTorch's fast kernels refuse a mask. Exact: the result differs from stock by rounding alone, but for tokens that
are hidden themselves, which nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewise.kernels.attention.dispatch import BACKENDS, Backend, block_sparse_attention
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
) -> torch.Tensor | None:
    """Each group of samples over the tokens that it keeps, (B, S, H, D), with 0 for the others; None where the kernel does not
    take the tensors. plan_of: gives the plan of dense attention over so many tokens, on a device."""
    query = request.query
    taken = [group.take(query, request.key, request.value) for group in groups]
    plans = [plan_of(part[0].shape[1], query.device) for part in taken]
    if any(HOPPER.unsupported(*part, plan) is not None for part, plan in zip(taken, plans, strict=True)):
        return None
    found = (
        block_sparse_attention(*part, plan, scale=scale, backend=HOPPER.name)
        for part, plan in zip(taken, plans, strict=True)
    )
    if len(groups) == 1 and groups[0].tokens is None:
        return next(found)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for group, part in zip(groups, found, strict=True):
        group.put(out, part)
    return out


def attend_window(
    request: AttentionRequest, plan_of: Callable[[int, torch.device, int], BlockPlan]
) -> torch.Tensor | None:
    """A chunk's queries over all keys of a KV cache's window; None where the kernel does not take the tensors."""
    query, key, value = request.qkv
    plan = plan_of(query.shape[1], query.device, key.shape[1])
    if HOPPER.unsupported(query, key, value, plan) is not None:
        return None
    return block_sparse_attention(query, key, value, plan, scale=request.scale, backend=HOPPER.name)
