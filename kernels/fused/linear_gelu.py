"""A linear layer and its GELU in one matrix product: the activation is applied to the accumulators, before they are stored.

    y = GELU(x·Wᵀ + b),   GELU(z) = z/2·(1 + tanh(√(2/π)·(z + 0.044715·z³)))            (arXiv 1606.08415, tanh form)

The separate operators write x·Wᵀ + b, the widest tensor of a transformer block, and read it again. cuBLASLt has this epilogue,
and PyTorch offers it as ``aten::_addmm_activation``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x·weightᵀ + bias), tanh form.

    Args:
        x: (..., K). weight: (N, K). bias: (N,). One dtype and device.

    Returns:
        (..., N) in that dtype.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ.
    """
    where = f"linear_gelu(x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)})"
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(f"{where}: needs x (..., K), weight (N, K) and bias (N,)")
    if not x.device == weight.device == bias.device:
        raise ValueError(f"{where}: needs one device, got {x.device}, {weight.device} and {bias.device}")
    if not x.dtype == weight.dtype == bias.dtype:
        raise TypeError(f"{where}: needs one dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}")
    return linear_gelu_op(x, weight, bias)


def linear_gelu_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The two operators, one after the other."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@torch.library.custom_op("tilewise::linear_gelu", mutates_args=())
def linear_gelu_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """An operator of its own: torch.compile would take ``_addmm_activation`` apart again."""
    if x.device.type != "cuda":  # elsewhere PyTorch's operator has the other GELU, with erf
        return linear_gelu_reference(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


@linear_gelu_op.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
