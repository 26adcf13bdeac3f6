"""Dense attention by our own kernel, where it is at least as fast as what PyTorch chooses: the steps and layers that a method
leaves dense, and ``patch(pipe, "dense")``.

The same kernel, given a plan in which every query sees every key. Exact: the result differs from stock by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.kernels.attention import BACKENDS, Backend
from tilewise.kernels.layout import Grid, Layout
from tilewise.kernels.plan import BlockPlan, dense_plan

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
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    backend: Any,
    parallel_config: Any,
) -> bool:
    """Whether a dense attention call (tensors (B, S, H, D)) is plain self-attention on a Hopper GPU, of a length that pays, for
    which nobody chose another backend. Whether the kernel takes the tensors is ``HOPPER.misfit``'s to say."""
    tokens = query.shape[1]
    plain = attn_mask is None and not dropout_p and not is_causal and parallel_config is None
    if not plain or not MIN_TOKENS <= tokens <= MAX_TOKENS or key.shape != value.shape or key.shape[1] != tokens:
        return False
    same = query.dtype == key.dtype == value.dtype and query.shape[0] == key.shape[0]
    same = same and query.shape[2] % key.shape[2] == 0 and all(x.stride(3) == 1 for x in (query, key, value))
    return same and HOPPER.missing(query.device) is None and _is_default(backend)


def _is_default(backend: Any) -> bool:
    """Whether the processor's backend, or diffusers' active one where it has none, is PyTorch's own choice."""
    from diffusers.models import attention_dispatch

    if backend is None:
        backend = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return backend == attention_dispatch.AttentionBackendName.NATIVE
