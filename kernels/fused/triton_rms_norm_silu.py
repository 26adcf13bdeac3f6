"""Triton kernel of ``rms_norm_silu``: a program keeps a few pixels in registers, so each is read and written once.

    s = x + bias + residual,   n = SiLU(√C · s / max(‖s‖₂, eps) · weight)

s may be written over x: a program reads the whole of its rows before it writes any of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_xb, stride_xs, stride_rb, stride_rs, stride_ob, stride_os,
    S, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, KEEP_SUM: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of ROWS pixels, B). Absent pointers are None; without ``out_ptr`` there is the sum alone."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)[None, :]
    column_mask = columns < C
    mask = column_mask & (rows < S)
    at = x_ptr + batch * stride_xb + rows * stride_xs + columns
    s = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(
            residual_ptr + batch * stride_rb + rows * stride_rs + columns, mask=mask, other=0.0
        ).to(tl.float32)  # fmt: skip
    rounded = s.to(x_ptr.dtype.element_ty)
    if KEEP_SUM:
        tl.store(at, rounded, mask=mask)
    if out_ptr is not None:
        s = rounded.to(tl.float32)
        norm = tl.sqrt(tl.sum(s * s, 1))
        ROOT: tl.constexpr = C**0.5
        n = s * (ROOT / tl.maximum(norm, eps))[:, None]
        n *= tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        if SILU:
            n = n / (1.0 + tl.exp(-n))
        tl.store(
            out_ptr + batch * stride_ob + rows * stride_os + columns, n.to(out_ptr.dtype.element_ty), mask=mask
        )  # fmt: skip


def launch_config(channels: int) -> dict[str, int]:
    """Tile and warps: 16 channels a thread, which is two 16-byte accesses of 16 bit; a warp or more of whole pixels."""
    block = max(triton.next_power_of_2(channels), 16)
    rows = max(2048 // block, 1)
    return {"BLOCK_C": block, "ROWS": rows, "num_warps": min(max(rows * block // (32 * 16), 1), 8)}


def triton_rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    keep_sum: bool,
    silu: bool,
    eps: float,
) -> None:
    """Launch the kernel. Arguments as in ``rms_norm_silu``, which validates them."""
    B, S, C = x.shape
    if B * S == 0:
        return
    config = launch_config(C)
    strides = [s for y in (x, residual, out) for s in ((0, 0) if y is None else (y.stride(0), y.stride(1)))]
    with torch.cuda.device_of(x):
        rms_norm_silu_kernel[(triton.cdiv(S, config["ROWS"]), B)](
            x, weight, bias, residual, out, *strides, S, eps, C=C, KEEP_SUM=keep_sum, SILU=silu, **config
        )  # fmt: skip
