"""Triton kernel of ``residual_norm``: a program keeps a row, or a few, in registers, so each is read and written once.

    h' = h + gate·y,   n = LayerNorm(h')·(weight + scale) + (bias + shift)

The variance is taken of the differences from the mean, not from the mean of squares, which loses digits where the mean is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _modulation(ptr, batch, rows, columns, stride_b, stride_s, mask, column_mask, PER_TOKEN: tl.constexpr):
    """Gate, scale or shift in float32: a row for each token, or one that all share, (1, BLOCK_C)."""
    at = ptr + batch * stride_b + columns
    if PER_TOKEN:
        x = tl.load(at + rows * stride_s, mask=mask, other=0.0)
    else:
        x = tl.load(at, mask=column_mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def residual_norm_kernel(
    h_ptr, y_ptr, gate_ptr, gate_base_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, h_out_ptr, n_out_ptr,
    stride_hb, stride_hs, stride_yb, stride_ys, stride_gb, stride_gs, stride_cb, stride_cs, stride_fb, stride_fs,
    S, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of ROWS tokens, B). Strides of gate, scale (c) and shift (f); absent pointers are None."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)[None, :]
    column_mask = columns < C
    mask = column_mask & (rows < S)
    h = tl.load(h_ptr + batch * stride_hb + rows * stride_hs + columns, mask=mask, other=0.0).to(tl.float32)
    out_at = (batch * S + rows) * C + columns
    if y_ptr is not None:
        y = tl.load(y_ptr + batch * stride_yb + rows * stride_ys + columns, mask=mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = _modulation(gate_ptr, batch, rows, columns, stride_gb, stride_gs, mask, column_mask, GATE_PER_TOKEN)
            if gate_base_ptr is not None:
                gate += tl.load(gate_base_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
            y = y * gate
        elif gate_base_ptr is not None:
            y = y * tl.load(gate_base_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        rounded = (h + y).to(h_out_ptr.dtype.element_ty)
        tl.store(h_out_ptr + out_at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(h, 1) / C
        n = tl.where(column_mask, h - mean[:, None], 0.0)
        variance = tl.sum(n * n, 1) / C
        n = n * tl.rsqrt(variance + eps)[:, None]
        if scale_ptr is not None:
            factor = _modulation(
                scale_ptr, batch, rows, columns, stride_cb, stride_cs, mask, column_mask, SCALE_PER_TOKEN
            )
            if weight_ptr is not None:
                factor += tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
            else:
                factor += 1.0
            n = n * factor
        elif weight_ptr is not None:
            n = n * tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            n += _modulation(shift_ptr, batch, rows, columns, stride_fb, stride_fs, mask, column_mask, SHIFT_PER_TOKEN)
        if bias_ptr is not None:
            n += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        tl.store(n_out_ptr + out_at, n.to(n_out_ptr.dtype.element_ty), mask=mask)


def launch_config(channels: int) -> dict[str, int]:
    """Tile size, rows and warps: 16 channels a thread (two 16-byte accesses of 16 bit), 32 where that takes over 8 warps.

    One row a program wherever a row fills its warps: a vector that several rows share has another register layout than they
    have, and the exchange through shared memory costs more than reading it again from the cache.
    """
    block = triton.next_power_of_2(channels)
    rows = max(512 // block, 1)  # of short rows several, so that a warp has enough to do
    warps = 16 if block > 8192 else min(max(rows * block // (32 * 16), 1), 8)
    return {"BLOCK_C": block, "ROWS": rows, "num_warps": warps}


def triton_residual_norm(
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
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Arguments as in ``residual_norm``, which validates them; modulation as (1 or B, 1 or S, C)."""
    B, S, C = hidden.shape
    h_out = hidden.new_empty((B, S, C) if y is not None else 0)
    n_out = hidden.new_empty((B, S, C) if norm else 0)
    if B * S == 0:
        return h_out, n_out
    config = launch_config(C) if config is None else config
    per_token = [x is not None and x.shape[1] > 1 for x in (gate, scale, shift)]
    with torch.cuda.device_of(hidden):
        residual_norm_kernel[(triton.cdiv(S, config["ROWS"]), B)](
            hidden, y, gate, gate_base, weight, bias, scale, shift, h_out, n_out,
            *_strides(hidden), *_strides(y), *_strides(gate), *_strides(scale), *_strides(shift),
            S, eps,
            C=C, NORM=norm,
            GATE_PER_TOKEN=per_token[0], SCALE_PER_TOKEN=per_token[1], SHIFT_PER_TOKEN=per_token[2],
            **config,
        )  # fmt: skip
    return h_out, n_out


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Strides of batch and token axes, 0 where there is one entry for all."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)
