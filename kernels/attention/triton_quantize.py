"""Triton kernel of quantize.py: one pass over q, k and v; a program turns one block of one head into 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.attention.quantize import VALUES, Precision, Quantized, blocks_of_means
from tilewise.kernels.plans.block_plan import BlockPlan


@triton.jit
def _load_block(x_ptr, stride_b, stride_s, stride_h, starts, rows, heads, row, D: tl.constexpr):
    """Rows ``row`` of this program's block, (R, D) float32, missing ones 0; and which are there."""
    block, batch, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    at = (tl.load(starts + block) + row).to(tl.int64)
    inside = (row < tl.load(rows + block))[:, None]
    base = x_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    x = tl.load(base + at[:, None] * stride_s + tl.arange(0, D)[None, :], mask=inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit
def _nearest(x):
    """Nearest integer, ties to even: what adding 1.5 · 2²³ leaves of |x| ≤ 2²²."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_queries_kernel(
    q_ptr, stride_b, stride_s, stride_h, starts, rows, k_mean, out, facts, heads, group, scale,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, batch × heads)."""
    row = tl.arange(0, R)
    x, _ = _load_block(q_ptr, stride_b, stride_s, stride_h, starts, rows, heads, row, D)
    peak = tl.max(tl.abs(x), 1)
    unit = tl.where(peak > 0, peak / 127.0, 1.0)
    # Key heads of all samples lie one after another, ``group`` times fewer than query heads.
    mean = tl.load(k_mean + (tl.program_id(1) // group) * D + tl.arange(0, D))
    shift = tl.sum(x * mean[None, :], 1) * scale
    block = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    at = out + block * R * D + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, _nearest(x / unit[:, None]))
    tl.store(facts + block * 2 * R + row, unit)
    tl.store(facts + block * 2 * R + R + row, shift)


@triton.jit
def quantize_keys_kernel(
    k_ptr, stride_b, stride_s, stride_h, starts, rows, k_mean, out, scales, heads, first, blocks,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid: (key blocks, batch × key heads). They are written from number ``first`` on, of ``blocks`` a head."""
    row = tl.arange(0, R)
    x, inside = _load_block(k_ptr, stride_b, stride_s, stride_h, starts, rows, heads, row, D)
    mean = tl.load(k_mean + tl.program_id(1) * D + tl.arange(0, D))
    x = tl.where(inside, x - mean[None, :], 0.0)
    peak = tl.max(tl.abs(x))
    unit = tl.where(peak > 0, peak / 127.0, 1.0)
    block = (tl.program_id(1) * blocks + first + tl.program_id(0)).to(tl.int64)
    at = out + block * R * D + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, _nearest(x / unit))
    tl.store(scales + 2 * block, unit)


@triton.jit
def quantize_values_kernel(
    v_ptr, stride_b, stride_s, stride_h, starts, rows, v_facts, out, scales, heads, first, blocks,
    D: tl.constexpr, R: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid and numbers as in ``quantize_keys_kernel``. Rows are read in ``key_order`` and written as columns."""
    column = tl.arange(0, R)
    key = column // 16 * 16 + column // 2 % 2 * 8 + column // 4 % 4 * 2 + column % 2
    x, inside = _load_block(v_ptr, stride_b, stride_s, stride_h, starts, rows, heads, key, D)
    channel = tl.arange(0, D)
    facts = v_facts + tl.program_id(1) * 2 * D
    spread, mean = tl.load(facts + channel), tl.load(facts + D + channel)
    x = tl.where(inside, (x - mean[None, :]) / spread[None, :], 0.0)
    peak = tl.max(tl.abs(x))
    unit = tl.where(peak > 0, peak / LARGEST, 1.0)
    block = (tl.program_id(1) * blocks + first + tl.program_id(0)).to(tl.int64)
    at = out + block * R * D + channel[:, None] * R + column[None, :]
    x = x / unit
    if INTEGER:
        tl.store(at, tl.trans(_nearest(x)))
    else:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        tl.store(at, tl.trans(x.to(out.dtype.element_ty)))
    tl.store(scales + 2 * block + 1, unit)


def triton_quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
    k_mean: torch.Tensor,
    v_facts: torch.Tensor,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Quantized:
    """Launch the kernels. Shapes as in ``quantize``."""
    B, _, H, D = q.shape
    Hk, Nq, Nk, R = k.shape[2], len(plan.q_start), len(plan.k_start), plan.block
    dtype, largest = VALUES[precision]
    device = q.device
    q8 = torch.empty((B, H, Nq, R, D), dtype=torch.int8, device=device)
    q_facts = torch.empty((B, H, Nq, 2, R), device=device)
    parts = [(k, v, plan.k_start, plan.k_rows, 0)]
    blocks = Nk
    if means is not None:
        start, rows = blocks_of_means(means[0].shape[1], R, device)
        parts.append((*means, start, rows, Nk))
        blocks += len(start)
    k8 = torch.empty((B, Hk, blocks, R, D), dtype=torch.int8, device=device)
    v8 = torch.empty((B, Hk, blocks, D, R), dtype=dtype, device=device)
    kv_scales = torch.empty((B, Hk, blocks, 2), device=device)
    k_mean, v_facts = k_mean.contiguous(), v_facts.contiguous()
    with torch.cuda.device_of(q):  # Triton launches on the current device
        quantize_queries_kernel[(Nq, B * H)](
            q, q.stride(0), q.stride(1), q.stride(2), plan.q_start, plan.q_rows, k_mean, q8, q_facts, H, H // Hk, scale,
            D=D, R=R, num_warps=4,
        )  # fmt: skip
        for key, value, start, rows, first in parts:
            quantize_keys_kernel[(len(start), B * Hk)](
                key, key.stride(0), key.stride(1), key.stride(2), start, rows, k_mean, k8, kv_scales, Hk, first, blocks,
                D=D, R=R, num_warps=4,
            )  # fmt: skip
            quantize_values_kernel[(len(start), B * Hk)](
                value, value.stride(0), value.stride(1), value.stride(2), start, rows, v_facts, v8, kv_scales, Hk, first, blocks,
                D=D, R=R, INTEGER=precision == "int8", LARGEST=largest, num_warps=4,
            )  # fmt: skip
    return Quantized(q=q8, q_facts=q_facts, k=k8, v=v8, kv_scales=kv_scales, v_facts=v_facts)
