"""Triton kernel of ``quantize_rows``: a program keeps a row in registers, so that it is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.fused.quantize_rows import EPS, LARGEST


@triton.jit
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, stride_x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, LARGEST: tl.constexpr
):  # fmt: skip
    """Grid: (M,). q is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    mask = columns < K
    x = tl.load(x_ptr + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), eps) / LARGEST
    # x / scale may round to just above the largest number, which would become NaN.
    q = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    tl.store(q_ptr + row * K + columns, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


def launch_config(columns: int) -> dict[str, int]:
    """Tile and warps: 16 columns a thread, up to 16 warps."""
    block = max(triton.next_power_of_2(columns), 32)
    return {"BLOCK_K": block, "num_warps": min(max(block // (32 * 16), 1), 16)}


def triton_quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Arguments as in ``quantize_rows``, which validates them."""
    M, K = x.shape
    q = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    if M:
        with torch.cuda.device_of(x):
            quantize_rows_kernel[(M,)](x, q, scale, x.stride(0), EPS, K=K, LARGEST=LARGEST, **launch_config(K))
    return q, scale
