"""Linear layers whose weights torchao has in fp8: their inputs are turned into fp8 by one kernel, not by six operators.

    y = (scale_x · q_x) (scale_w · q_w)ᵀ + bias          a scale a row of x and a row of w (an output channel)

torchao's ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`` has such weights. Without ``torch.compile`` its
operators read and write the input several times, and a model gains nothing from 8 bits.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from tilewise.kernels.fused.quantize_rows import MAX_COLUMNS, has_fp8, quantize_rows
from tilewise.plugins.hooks.forward_override import ForwardOverride, override_forward


class Asked(Protocol):
    def fused_here(self, x: torch.Tensor) -> bool:
        """Whether fused kernels may run on an input like ``x``."""


def fuse_fp8_linears(denoiser: nn.Module, state: Asked) -> list[ForwardOverride]:
    """Put the forward of this file on each linear layer that has such weights; returns the handles.

    state: asked at each call.
    """
    layers = [module for module in denoiser.modules() if type(module) is nn.Linear and is_fp8(module.weight)]
    return [handle for one in layers if (handle := override_forward(one, _forward, state))]


def is_fp8(weight: Any) -> bool:
    """Whether a weight is torchao's, in float8 e4m3 with a scale a row, for inputs that are turned into the same."""
    if type(weight).__name__ != "Float8Tensor" or getattr(weight, "qdata", None) is None:
        return False
    inputs = weight.act_quant_kwargs
    return (
        weight.qdata.dtype == torch.float8_e4m3fn
        and weight.qdata.ndim == 2
        and tuple(weight.scale.shape) == (weight.qdata.shape[0], 1)
        and all(size % 16 == 0 for size in weight.qdata.shape)  # what torch._scaled_mm takes
        and weight.qdata.shape[1] <= MAX_COLUMNS
        and inputs is not None
        and inputs.float8_dtype == torch.float8_e4m3fn
        and type(inputs.granularity).__name__ == "PerRow"
        and inputs.hp_value_lb is None
        and inputs.hp_value_ub is None
    )


def fp8_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's output (…, N) in bfloat16.

    Args:
        x: (…, K) bfloat16. weight: (N, K), for which ``is_fp8`` holds. bias: (N,) bfloat16.
    """
    rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    out = torch._scaled_mm(
        rows, weight.qdata.t(), scale_a=scale, scale_b=weight.scale.t(), bias=bias, out_dtype=x.dtype,
        use_fast_accum=weight.mm_config is None or weight.mm_config.use_fast_accum,
    )  # fmt: skip
    return out.view(*x.shape[:-1], out.shape[1])


def _forward(override: ForwardOverride, x: torch.Tensor) -> torch.Tensor:
    linear: Any = override.module
    state, bias = override.state, linear.bias
    if (
        state is None
        or torch.compiler.is_compiling()  # which fuses torchao's operators itself
        or x.dtype != torch.bfloat16  # torch._scaled_mm returns nothing else where scales are of rows
        or not (bias is None or bias.dtype == x.dtype)
        or x.shape[-1] != linear.in_features
        or x.stride(-1) != 1
        or not state.fused_here(x)
        or not has_fp8(x.device)
        or not is_fp8(linear.weight)
        or linear.weight.qdata.device != x.device
    ):
        out: torch.Tensor = override.stock(x)
        return out
    return fp8_linear(x, linear.weight, bias)
