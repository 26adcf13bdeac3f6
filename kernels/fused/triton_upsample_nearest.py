"""Triton kernel of ``upsample_nearest``: a program reads a few pixels once and writes each four times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def upsample_nearest_kernel(
    x_ptr, out_ptr, H, W,
    K: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of ROWS pixels of a frame, B·T·K)."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    out_frame = tl.program_id(1).to(tl.int64)
    frame, k = out_frame // K, out_frame % K
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = (columns < C) & (pixel < H * W)
    x = tl.load(x_ptr + (frame * H * W + pixel) * (K * C) + k * C + columns, mask=mask)
    row, column = pixel // W, pixel % W
    first = out_ptr + ((out_frame * 2 * H + 2 * row) * (2 * W) + 2 * column) * C + columns
    tl.store(first, x, mask=mask)
    tl.store(first + C, x, mask=mask)
    second = first + 2 * W * C
    tl.store(second, x, mask=mask)
    tl.store(second + C, x, mask=mask)


def launch_config(channels: int) -> dict[str, int]:
    """Tile and warps: 16 channels a thread."""
    block = max(triton.next_power_of_2(channels), 16)
    rows = max(2048 // block, 1)
    return {"BLOCK_C": block, "ROWS": rows, "num_warps": min(max(rows * block // (32 * 16), 1), 8)}


def triton_upsample_nearest(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Launch the kernel. Arguments as in ``upsample_nearest``, which validates them."""
    B, T, H, W, KC = x.shape
    C = KC // frames
    out = x.new_empty((B, T * frames, 2 * H, 2 * W, C))
    if out.numel() == 0:
        return out
    config = launch_config(C)
    with torch.cuda.device_of(x):
        upsample_nearest_kernel[(triton.cdiv(H * W, config["ROWS"]), B * T * frames)](
            x, out, H, W, K=frames, C=C, **config
        )
    return out
