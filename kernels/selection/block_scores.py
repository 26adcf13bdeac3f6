"""Maps of block pairs, element by element: what a query block gives to a key block, what skipping it costs, what stands for it.

    term[i, j]   = ½ s²,  beyond s² = 2 log n along its tangent:  s √(2 log n) − log n            what keys get for differing
    logit[i, j]  = scale · q̄ᵢ·k̄ⱼ + log nⱼ + term                                                 log of the attention mass
    error[i, j]  = logit + ½ log(e^{s²} (1 − e^{−s²})) + ½ log spreadⱼ                             log of a summary row's error
    bias[i, j]   = log nⱼ + term,  −inf where j was seen                                           of a summary row

s²[i, j] is the variance of query i's scores within key block j, n its tokens, spread the trace of its values' variance
(block_logits.py). Queries and keys may have blocks of their own, as a chunk and a window of chunks do. A map has 1/128² of
attention's pairs, and still 80 MB at 115,200 tokens and 24 heads: each of these is one pass over it.
"""

from __future__ import annotations

import torch

from tilewise.kernels.device import runs_triton

LEAST_S2, LEAST_SPREAD = 1e-12, 1e-30  # below, a logarithm would be that of 0


def block_logits(dot: torch.Tensor, s2: torch.Tensor | None, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """logit: see the module's docstring.

    Args:
        dot: (B, H, Nq, Nk) float32, q̄ᵢ·k̄ⱼ. s2: the same shape, or None for no term.
        rows: (Nk,) tokens of each key block, on dot's device. scale: of the scores.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check("block_logits", rows, dot=dot, **({} if s2 is None else {"s2": s2}))
    if _fused(dot):
        from tilewise.kernels.selection.triton_block_scores import triton_block_logits

        return triton_block_logits(dot, s2, rows, scale)
    logits = scale * dot + rows.log()
    return logits if s2 is None else logits + variance_term(s2, rows)


def error_logits(logits: torch.Tensor, s2: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """error, up to a constant of the row: see the module's docstring.

    Args:
        logits, s2: (B, H, Nq, Nk) float32. spread: (B, Hk, Nk) float32, Hk dividing H.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, H, _, N = logits.shape
    if s2.shape != logits.shape or spread.ndim != 3 or spread.shape[::2] != (B, N) or H % spread.shape[1]:
        raise ValueError(
            f"error_logits: logits {tuple(logits.shape)}, s2 {tuple(s2.shape)} and spread {tuple(spread.shape)} do not fit"
        )
    if _fused(logits):
        from tilewise.kernels.selection.triton_block_scores import triton_error_logits

        return triton_error_logits(logits, s2, spread)
    s2 = s2.clamp_min(LEAST_S2)
    spread = spread.repeat_interleave(H // spread.shape[1], 1)[:, :, None]
    return logits + 0.5 * (s2 + torch.log(-torch.expm1(-s2))) + 0.5 * spread.clamp_min(LEAST_SPREAD).log()


def summary_bias(s2: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """bias: see the module's docstring.

    Args:
        s2: (B, H, Nq, Nk) float32. rows: (Nk,) tokens of each key block. seen: bool of s2's shape.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check("summary_bias", rows, s2=s2, seen=seen)
    if _fused(s2):
        from tilewise.kernels.selection.triton_block_scores import triton_summary_bias

        return triton_summary_bias(s2, rows, seen)
    return (rows.log() + variance_term(s2, rows)).masked_fill(seen, -torch.inf)


def variance_term(s2: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """term, of s2's shape: see the module's docstring."""
    limit = 2 * rows.log()
    return torch.where(s2 <= limit, s2 / 2, (s2 * limit).clamp_min(0).sqrt() - limit / 2)


def _check(where: str, rows: torch.Tensor, **maps: torch.Tensor) -> None:
    shapes = {name: tuple(x.shape) for name, x in maps.items()}
    first = next(iter(maps.values()))
    if first.ndim != 4 or len(set(shapes.values())) > 1 or first.shape[3] != len(rows):
        raise ValueError(
            f"{where}: needs maps (B, H, Nq, Nk) of the same shape and rows (Nk,), got {shapes}, {len(rows)}"
        )


def _fused(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and runs_triton(x.device)
