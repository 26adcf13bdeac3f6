"""Between two convolutions of a video autoencoder: bias, residual, RMS norm and SiLU in one pass.

    s = x + bias + residual                                             bias and residual optional
    n = SiLU(√C · s / max(‖s‖₂, eps) · weight)                          SiLU(z) = z / (1 + exp(−z)), optional

‖s‖₂ is over the C channels of a pixel: RMSNorm (arXiv 1910.07467) with the epsilon of ``F.normalize``. All of it in float32; s is
rounded to x's dtype, and the norm is taken of the rounded s, which is what the separate operators do. Pixels are rows of
contiguous channels, as channels-last convolutions have them, and a convolution's bias is added here, where PyTorch would read
and write its whole output again.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import FLOATS, runs_triton

MAX_CHANNELS = 8192


def rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    keep_sum: bool = False,
    silu: bool = True,
    eps: float = 1e-12,
) -> torch.Tensor:
    """SiLU(RMSNorm(x + bias + residual)).

    Args:
        x: (B, S, C) float16, bfloat16 or float32 with contiguous channels, C ≤ 8192; any other strides.
        weight, bias: (C,), any of the three dtypes.
        residual: as x, any of the three dtypes.
        out: where the result goes, as x: a part of a larger buffer, say. It must not overlap x or residual.
        keep_sum: also write x + bias + residual over x.
        silu: False: the norm alone.
        eps: the least norm ‖s‖₂ that s is divided by.

    Returns:
        ``out``; a new contiguous (B, S, C) in x's dtype where none was given.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: another dtype.
    """
    where = f"rms_norm_silu(x {tuple(x.shape)})"
    _check(where, x, weight=weight, bias=bias, residual=residual, out=out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out.dtype != x.dtype:
        raise TypeError(f"{where}: out must have x's dtype {x.dtype}, got {out.dtype}")
    _run(x, weight, bias, residual, out, keep_sum and (bias is not None or residual is not None), silu, eps)
    return out


def add_in_place(
    x: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x + bias + residual, written over x, which it returns: rounded once. Arguments as in ``rms_norm_silu``."""
    _check(f"add_in_place(x {tuple(x.shape)})", x, weight=None, bias=bias, residual=residual, out=None)
    if bias is not None or residual is not None:
        _run(x, None, bias, residual, None, True, False, 0.0)
    return x


def _check(where: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    if x.ndim != 3 or not 0 < x.shape[2] <= MAX_CHANNELS or x.stride(2) != 1:
        raise ValueError(
            f"{where}: x must be (B, S, C) with contiguous channels and C ≤ {MAX_CHANNELS}, got strides {x.stride()}"
        )
    for name, other in {"x": x, **others}.items():
        if other is None:
            continue
        shape = tuple(x.shape[2:] if name in ("weight", "bias") else x.shape)
        if tuple(other.shape) != shape or other.stride(-1) != 1:
            raise ValueError(
                f"{where}: {name} must be {shape} with contiguous channels, got {tuple(other.shape)}, "
                f"strides {other.stride()}"
            )
        if other.dtype not in FLOATS:
            raise TypeError(f"{where}: takes float16, bfloat16 and float32, got {other.dtype} for {name}")
        if other.device != x.device:
            raise ValueError(f"{where}: all tensors must be on one device, got {x.device} and {other.device}")


def rms_norm_silu_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    silu: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The formula: s in x's dtype, and n in float32, or None without ``weight``."""
    s = x.float()
    for part in (bias, residual):
        if part is not None:
            s = s + part.float()
    s = s.to(x.dtype)
    if weight is None:
        return s, None
    z = s.float()
    n = z / z.norm(dim=-1, keepdim=True).clamp_min(eps) * (x.shape[-1] ** 0.5 * weight.float())
    return s, n * torch.sigmoid(n) if silu else n


def _run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    keep_sum: bool,
    silu: bool,
    eps: float,
) -> None:
    if runs_triton(x.device):
        from tilewise.kernels.fused.triton_rms_norm_silu import triton_rms_norm_silu

        triton_rms_norm_silu(x, weight, bias, residual, out, keep_sum, silu, eps)
        return
    s, n = rms_norm_silu_reference(x, weight, bias, residual, silu, eps)
    if keep_sum:
        x.copy_(s)
    if out is not None and n is not None:
        out.copy_(n)
