"""Triton kernel of ``qk_norm_rope``: one program a token and tensor, which keeps the row in registers.

    n = x / √(mean(x²) + eps) · weight,   then   (a, b) → (a·cos − b·sin, a·sin + b·cos) for each pair of channels

A row is a tile of heads × channels, so that a table row of D channels is read once for all heads. It is read and written once,
16 bytes a thread where alignment allows; pairs of neighbours are taken apart in registers. With an order, a program reads token
order[i] and writes row i, so the writes stay in sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _load_pairs(at, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
                INTERLEAVED: tl.constexpr):  # fmt: skip
    """The first and the second channels of the pairs of HEADS × D values from ``at``, two (BLOCK_H, BLOCK_P) in float32."""
    head = tl.arange(0, BLOCK_H)[:, None]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_P)[None, :]
        x = tl.load(at + head * D + channel, mask=(head < HEADS) & (channel < D), other=0.0)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_P, 2)))
    else:
        pair = tl.arange(0, BLOCK_P)[None, :]
        inside = (head < HEADS) & (pair < D // 2)
        a = tl.load(at + head * D + pair, mask=inside, other=0.0)
        b = tl.load(at + head * D + D // 2 + pair, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(at, a, b, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
                 INTERLEAVED: tl.constexpr):  # fmt: skip
    head = tl.arange(0, BLOCK_H)[:, None]
    a = a.to(at.dtype.element_ty)
    b = b.to(at.dtype.element_ty)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_P)[None, :]
        x = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_P))
        tl.store(at + head * D + channel, x, mask=(head < HEADS) & (channel < D))
    else:
        pair = tl.arange(0, BLOCK_P)[None, :]
        inside = (head < HEADS) & (pair < D // 2)
        tl.store(at + head * D + pair, a, mask=inside)
        tl.store(at + head * D + D // 2 + pair, b, mask=inside)


@triton.jit
def _row(
    x_at, weight_ptr, cos_at, sin_at, out_at, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr, FULL_TABLES: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of one token's row, (HEADS, D) from ``x_at``."""
    a, b = _load_pairs(x_at, HEADS, D, BLOCK_H, BLOCK_P, INTERLEAVED)
    if ROTARY:
        if FULL_TABLES:
            cos, _ = _load_pairs(cos_at, 1, D, 1, BLOCK_P, INTERLEAVED)
            _, sin = _load_pairs(sin_at, 1, D, 1, BLOCK_P, INTERLEAVED)
        else:
            pair = tl.arange(0, BLOCK_P)[None, :]
            cos = tl.load(cos_at + pair, mask=pair < D // 2, other=0.0).to(tl.float32)
            sin = tl.load(sin_at + pair, mask=pair < D // 2, other=0.0).to(tl.float32)
    squares = tl.sum(a * a + b * b, 1)
    if ACROSS:
        rstd = tl.rsqrt(tl.sum(squares, 0) / (HEADS * D) + eps)
    else:
        rstd = tl.rsqrt(squares / D + eps)[:, None]
    a = a * rstd
    b = b * rstd
    if weight_ptr is not None:
        if ACROSS:
            wa, wb = _load_pairs(weight_ptr, HEADS, D, BLOCK_H, BLOCK_P, INTERLEAVED)
        else:
            wa, wb = _load_pairs(weight_ptr, 1, D, 1, BLOCK_P, INTERLEAVED)
        a = a * wa
        b = b * wb
    if ROTARY:
        turned = a * cos - b * sin
        b = a * sin + b * cos
        a = turned
    _store_pairs(out_at, a, b, HEADS, D, BLOCK_H, BLOCK_P, INTERLEAVED)


@triton.jit
def qk_norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, order_ptr, q_out_ptr, k_out_ptr,
    stride_qb, stride_qs, stride_kb, stride_ks, stride_cb, stride_cs, stride_sb, stride_ss,
    S, eps,
    HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KH: tl.constexpr, BLOCK_P: tl.constexpr,
    ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, FULL_TABLES: tl.constexpr,
):  # fmt: skip
    """Grid: (2·S, B). Neighbouring programs do q and k of one token and share its table rows in the cache."""
    position = (tl.program_id(0) // 2).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    token = position
    if order_ptr is not None:
        token = tl.load(order_ptr + position)
    ROTARY: tl.constexpr = cos_ptr is not None
    cos_at = None
    sin_at = None
    if ROTARY:
        cos_at = cos_ptr + batch * stride_cb + token * stride_cs
        sin_at = sin_ptr + batch * stride_sb + token * stride_ss
    row = batch * S + position
    if tl.program_id(0) % 2 == 0:
        _row(
            q_ptr + batch * stride_qb + token * stride_qs, q_weight_ptr, cos_at, sin_at,
            q_out_ptr + row * (HEADS * D), eps,
            HEADS, D, BLOCK_H, BLOCK_P, ACROSS, INTERLEAVED, ROTARY, FULL_TABLES,
        )  # fmt: skip
    else:
        _row(
            k_ptr + batch * stride_kb + token * stride_ks, k_weight_ptr, cos_at, sin_at,
            k_out_ptr + row * (K_HEADS * D), eps,
            K_HEADS, D, BLOCK_KH, BLOCK_P, ACROSS, INTERLEAVED, ROTARY, FULL_TABLES,
        )  # fmt: skip


def launch_config(heads: int, k_heads: int, head_dim: int) -> dict[str, int]:
    """Tile sizes and warps: 16 channels a thread (two 16-byte accesses of 16 bit), 32 where that takes over 8 warps.

    By the registers that the compiler reports, this keeps some 30 to 40 KiB of rows in flight on each multiprocessor, which
    is what the latency of the memory asks for; more warps a row, or more rows a program, keep fewer.
    """
    pairs = triton.next_power_of_2(head_dim // 2)
    block_h, block_kh = triton.next_power_of_2(heads), triton.next_power_of_2(k_heads)
    channels = max(block_h, block_kh) * pairs * 2
    warps = 16 if channels > 8192 else min(max(channels // (32 * 16), 1), 8)
    return {"BLOCK_H": block_h, "BLOCK_KH": block_kh, "BLOCK_P": pairs, "num_warps": warps}


def triton_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    heads: int,
    eps: float,
    across_heads: bool,
    interleaved: bool,
    order: torch.Tensor | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Arguments as in ``qk_norm_rope``, which validates them; tables as (1 or B, S, N)."""
    B, S, channels = q.shape
    D = channels // heads
    k_heads = k.shape[2] // D
    q_out, k_out = q.new_empty((B, S, heads, D)), k.new_empty((B, S, k_heads, D))
    if B * S == 0:
        return q_out, k_out
    config = launch_config(heads, k_heads, D)
    if num_warps is not None:
        config["num_warps"] = num_warps
    strides = [0, 0, 0, 0]
    if cos is not None and sin is not None:
        for i, table in enumerate((cos, sin)):
            strides[2 * i] = 0 if table.shape[0] == 1 else table.stride(0)
            strides[2 * i + 1] = table.stride(1)
    if order is not None:
        order = order.contiguous()
    with torch.cuda.device_of(q):
        qk_norm_rope_kernel[(2 * S, B)](
            q, k, q_weight, k_weight, cos, sin, order, q_out, k_out,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), *strides,
            S, eps,
            HEADS=heads, K_HEADS=k_heads, D=D,
            ACROSS=across_heads, INTERLEAVED=interleaved, FULL_TABLES=cos is not None and cos.shape[2] == D,
            **config,
        )  # fmt: skip
    return q_out, k_out
