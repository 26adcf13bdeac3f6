"""Tokens into another order and back: what surrounds an attention call whose kernel needs its tokens in tile order.

    out[b, i] = x[b, order[i]]

A copy, so memory bandwidth is all that it can cost: each row is read and written once, in 16-byte accesses, and q, k and v
share one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewise.kernels.device import runs_triton


@torch.no_grad()
def reorder_tokens(tensors: Sequence[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """Row i of each result is row ``order[i]`` of the tensor.

    Tensors with rows of one size share a launch, four at most; others (the keys and values of grouped-query attention) take one
    more. There are no gradients. Not for torch.compile to trace: call it within a custom operator.

    Args:
        tensors: (B, S, H, D) each, of any dtype, with the same B and S; H and D may differ. Strides are free where channels are
            contiguous, so chunks of a packed projection and transposed (B, H, S, D) tensors are read in place.
        order: (S_out,) int64 on the same device, entries in [0, S). They may repeat, and rows may be left out. A GPU does not
            check them.

    Returns:
        (B, S_out, H, D) each, new and contiguous.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an order that is not int64.
        IndexError or RuntimeError: on a CPU, an entry of ``order`` outside [0, S).
    """
    where = f"reorder_tokens({', '.join(str(tuple(x.shape)) for x in tensors)}; order {tuple(order.shape)})"
    if order.ndim != 1:
        raise ValueError(f"{where}: order must have shape (S_out,)")
    if order.dtype != torch.int64:
        raise TypeError(f"{where}: order must be int64, got {order.dtype}; convert it once, where it is made")
    for x in tensors:
        if x.ndim != 4 or x.shape[:2] != tensors[0].shape[:2]:
            raise ValueError(f"{where}: tensors must be (B, S, H, D), with the same B and S")
        if x.device != order.device:
            raise ValueError(f"{where}: all tensors must be on the device of order, got {x.device} and {order.device}")
    if runs_triton(order.device):
        from tilewise.kernels.fused.triton_reorder import triton_reorder

        return triton_reorder(tensors, order)
    return reorder_tokens_reference(tensors, order)


def reorder_tokens_reference(tensors: Sequence[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """The formula, as PyTorch has it."""
    return [x.index_select(1, order).contiguous() for x in tensors]
