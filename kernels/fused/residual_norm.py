"""The residual stream between matrix products: gate, add, LayerNorm and modulation in one pass.

    h' = h + gate·y                                                     gate and y optional
    n  = LayerNorm(h')·(weight + scale) + (bias + shift)                each of the four optional

LayerNorm is arXiv 1607.06450; scale, shift and gate from the timestep are adaptive LayerNorm (DiT, arXiv 2212.09748), usually
written (1 + scale)·LayerNorm + shift, which is weight = 1. All of it in float32; h' is rounded to h's dtype, and the norm is
taken of the rounded h', which is what the separate operators do.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import FLOATS, runs_triton


def layer_norm(
    hidden: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """LayerNorm(hidden)·(weight + scale) + (bias + shift).

    Args:
        hidden: (B, S, C) float16, bfloat16 or float32 with contiguous channels, C ≤ 65536; any other strides.
        weight, bias: (C,); None: 1 and 0.
        scale, shift: (B, C), (1 or B, 1, C) or (1 or B, S, C), any of the three dtypes, with contiguous channels and any
            other strides: a slice of a (B, 6, C) or (B, S, 6, C) tensor comes as it is. None: 0.
        eps: added to the variance.

    Returns:
        (B, S, C), contiguous, in hidden's dtype.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: another dtype.
    """
    return _run("layer_norm", hidden, None, None, None, weight, bias, scale, shift, eps, True)[1]


def gated_residual(
    hidden: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_base: torch.Tensor | None = None,
) -> torch.Tensor:
    """hidden + (gate_base + gate)·y; a gate of which neither part is given is 1.

    Args:
        hidden, y: (B, S, C) as in ``layer_norm``; y's dtype may be another.
        gate: as ``scale`` in ``layer_norm``.
        gate_base: (C,), a part of the gate that all tokens share.

    Returns:
        (B, S, C), contiguous, in hidden's dtype.

    Raises:
        ValueError, TypeError: as ``layer_norm``.
    """
    return _run("gated_residual", hidden, y, gate, gate_base, None, None, None, None, 0.0, False)[0]


def residual_norm(
    hidden: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_base: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gated_residual`` and ``layer_norm`` of its result, in one pass: (h', n)."""
    return _run("residual_norm", hidden, y, gate, gate_base, weight, bias, scale, shift, eps, True)


def _run(
    name: str,
    hidden: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    where = f"{name}(hidden {tuple(hidden.shape)})"
    if hidden.ndim != 3 or hidden.stride(2) != 1 or not 0 < hidden.shape[2] <= 65536:
        raise ValueError(
            f"{where}: hidden must be (B, S, C) with contiguous channels and C ≤ 65536, got strides {hidden.stride()}"
        )
    if y is not None and (y.shape != hidden.shape or y.stride(2) != 1):
        raise ValueError(f"{where}: y must have hidden's shape and contiguous channels, got {tuple(y.shape)}")
    for which, row in (("gate_base", gate_base), ("weight", weight), ("bias", bias)):
        if row is not None and (row.shape != hidden.shape[2:] or row.stride(0) != 1):
            raise ValueError(
                f"{where}: {which} must be contiguous of shape ({hidden.shape[2]},), got {tuple(row.shape)}"
            )
    gate, scale, shift = (
        None if x is None else _modulation(which, x, hidden, where)
        for which, x in (("gate", gate), ("scale", scale), ("shift", shift))
    )
    for x in (hidden, y, gate, gate_base, weight, bias, scale, shift):
        if x is not None and x.dtype not in FLOATS:
            raise TypeError(f"{where}: takes float16, bfloat16 and float32, got {x.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{where}: all tensors must be on one device, got {hidden.device} and {x.device}")
    return residual_norm_op(hidden, y, gate, gate_base, weight, bias, scale, shift, eps, norm)


def _modulation(which: str, x: torch.Tensor, hidden: torch.Tensor, where: str) -> torch.Tensor:
    """Gate, scale or shift as (1 or B, 1 or S, C), a view."""
    B, S, C = hidden.shape
    given = tuple(x.shape)
    if x.ndim == 2:
        x = x.unsqueeze(1)
    if x.ndim != 3 or x.shape[0] not in (1, B) or x.shape[1] not in (1, S) or x.shape[2] != C or x.stride(2) != 1:
        raise ValueError(
            f"{where}: {which} must be (B, C), (B, 1, C) or (B, S, C) with contiguous channels, got {given}, "
            f"strides {x.stride()}"
        )
    return x


def residual_norm_reference(
    hidden: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    norm: bool,
    dtype: torch.dtype = torch.float32,
    rounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The formula, computed in ``dtype``, which is also what it returns; ``rounded``: h' is rounded to hidden's dtype."""

    def total(*parts: torch.Tensor | None) -> torch.Tensor | None:
        given = [part.to(dtype) for part in parts if part is not None]
        return sum(given[1:], given[0]) if given else None

    h = hidden.to(dtype)
    if y is not None:
        factor = total(gate, gate_base)
        h = h + (y.to(dtype) if factor is None else y.to(dtype) * factor)
        if rounded:
            h = h.to(hidden.dtype).to(dtype)
    if not norm:
        return h, None
    n = h - h.mean(-1, keepdim=True)
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        n = n * (scale.to(dtype) + (1 if weight is None else weight.to(dtype)))
    elif weight is not None:
        n = n * weight.to(dtype)
    offset = total(bias, shift)
    return h, n if offset is None else n + offset


@torch.library.custom_op("tilewise::residual_norm", mutates_args=())
def residual_norm_op(
    hidden: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel as a PyTorch operator, so that torch.compile keeps it whole: (h', n). Validated by the functions above.

    Without y there is no h', without ``norm`` no n: an empty tensor stands in.
    """
    if runs_triton(hidden.device):
        from tilewise.kernels.fused.triton_residual_norm import triton_residual_norm

        return triton_residual_norm(hidden, y, gate, gate_base, weight, bias, scale, shift, eps, norm)
    h, n = residual_norm_reference(hidden, y, gate, gate_base, weight, bias, scale, shift, eps, norm)
    none = hidden.new_empty(0)
    return (
        none if y is None else h.to(hidden.dtype).contiguous(),
        hidden.new_empty(0) if n is None else n.to(hidden.dtype).contiguous(),
    )


@residual_norm_op.register_fake
def _(hidden, y, gate, gate_base, weight, bias, scale, shift, eps, norm):
    return (
        hidden.new_empty(0 if y is None else hidden.shape),
        hidden.new_empty(hidden.shape if norm else 0),
    )
