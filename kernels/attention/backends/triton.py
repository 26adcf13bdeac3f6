"""Portable Triton forward kernel: executes any BlockPlan in one launch (sm_80 and later).

One program computes BLOCK_M query rows of one head: online softmax (FlashAttention-2, arXiv 2307.08691, algorithm 1) over the
key blocks that the plan lists for the program's query block, in base 2 with the scale folded in. The three runs of a list are
three loops, so that the first needs no mask:

    complete   acc += softmax(q kᵀ) v
    ragged     the same, columns past the block's rows masked
    partial    the same, and keys outside the row's intervals masked

Products of float32 are exact ones ("ieee"), not tf32; in 16 bits the option changes nothing, and AMD knows no other.

Inputs keep the (B, S, H, D) strides that they come with; offsets that can pass 2³¹ are computed in 64 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilewise.kernels.attention.backends.tiles import SINGLE, Tile, tile_of, width_of
from tilewise.kernels.chips import Chip, chip_of
from tilewise.kernels.plans.block_plan import BlockPlan

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    acc, row_max, row_sum, q,
    k_base, v_base, stride_ks, stride_vs,
    index, key_start, k_rows,
    key_encoding, row_lo, row_hi, guard_bits,
    begin, end, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_INTERVALS: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries begin … end − 1 of one list; each key block is PARTS pieces of BLOCK_N columns."""
    columns = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    for piece in range(begin * PARTS, end * PARTS):
        entry = piece // PARTS
        offset = (piece % PARTS) * BLOCK_N
        first = tl.load(key_start + entry).to(tl.int64) + offset
        keys = first + columns
        k_at = k_base + keys[None, :] * stride_ks + depth[:, None]
        v_at = v_base + keys[:, None] * stride_vs + depth[None, :]
        if MASK_ROWS:
            inside = columns < tl.load(k_rows + tl.load(index + entry)) - offset
            k = tl.load(k_at, mask=inside[None, :] & (depth < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=inside[:, None] & (depth < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(depth < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=(depth < D)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASK_INTERVALS:
            # Two subtractions test six inequalities, and the block's missing rows too: see kernels/plans/interval_encoding.py.
            at = tl.load(key_encoding + keys, mask=inside, other=guard_bits)
            above = (at | guard_bits)[None, :] - row_lo[:, None]
            below = row_hi[:, None] - at[None, :]
            scores = tl.where((guard_bits & ~(above & below)) == 0, scores, float("-inf"))
        elif MASK_ROWS:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        if MASK_ROWS:
            # A row may have seen nothing yet; −inf − −inf is NaN, so it is measured from 0 until it has.
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            base = new_max
        weights = tl.exp2(scores * scale - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    q_start, q_rows, k_rows,
    index, key_start, ends, head_set, key_encoding, row_encoding, guard_bits,
    stride_plan, sets, q_blocks, longest,
    heads, group, q_len, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    SHARED_SET: tl.constexpr, HAS_HEAD_SET: tl.constexpr, HAS_INTERVALS: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks × pieces of BLOCK_M rows, batch × heads). ``scale`` includes log2(e)."""
    SPLIT: tl.constexpr = BLOCK // BLOCK_M
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    block = tl.program_id(0) // SPLIT
    offset = (tl.program_id(0) % SPLIT) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.load(q_rows + block) - offset
    if rows <= 0:  # the second half of a query block that has only a first
        return
    if SHARED_SET:
        set_of_head = head * 0
    elif HAS_HEAD_SET:
        set_of_head = tl.load(head_set + head).to(tl.int64)
    else:
        set_of_head = head

    row = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    queries = tl.load(q_start + block).to(tl.int64) + offset + row
    in_block = row < rows
    q_at = q_ptr + batch * stride_qb + head * stride_qh + queries[:, None] * stride_qs + depth[None, :]
    q = tl.load(q_at, mask=in_block[:, None] & (depth < D)[None, :], other=0.0)
    k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh

    # stride_plan is 0 for a plan that all samples share.
    listing = batch * stride_plan + set_of_head * q_blocks + block
    complete_end = tl.load(ends + listing * 3)
    ragged_end = tl.load(ends + listing * 3 + 1)
    partial_end = tl.load(ends + listing * 3 + 2)
    index += listing * longest
    key_start += listing * longest

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_base, v_base, stride_ks, stride_vs, index, key_start, k_rows,
        key_encoding, row, row, guard_bits, 0, complete_end, scale,
        D, BLOCK_D, BLOCK_N, PARTS, False, False,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_base, v_base, stride_ks, stride_vs, index, key_start, k_rows,
        key_encoding, row, row, guard_bits, complete_end, ragged_end, scale,
        D, BLOCK_D, BLOCK_N, PARTS, True, False,
    )  # fmt: skip
    if HAS_INTERVALS:
        row_encoding_at = row_encoding + set_of_head * 2 * q_len + queries
        row_lo = tl.load(row_encoding_at, mask=in_block, other=0)
        row_hi = tl.load(row_encoding_at + q_len, mask=in_block, other=0)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, k_base, v_base, stride_ks, stride_vs, index, key_start, k_rows,
            key_encoding, row_lo, row_hi, guard_bits, ragged_end, partial_end, scale,
            D, BLOCK_D, BLOCK_N, PARTS, True, True,
        )  # fmt: skip

    # A row that saw no key: output 0, log-sum-exp −inf.
    seen = row_sum > 0
    acc = acc / tl.where(seen, row_sum, 1.0)[:, None]
    lse = tl.where(seen, (row_max + tl.log2(tl.where(seen, row_sum, 1.0))) * LN2, float("-inf"))
    out_at = out_ptr + batch * stride_ob + head * stride_oh + queries[:, None] * stride_os + depth[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_block[:, None] & (depth < D)[None, :])
    tl.store(lse_ptr + (batch * heads + head) * q_len + queries, lse, mask=in_block)


def launch_config(head_dim: int, block: int, itemsize: int, intervals: bool, chip: Chip) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for a head dimension, block size and element size in bytes: those of ``tiles.py``,
    and at most a block of the plan.

    Args:
        intervals: whether the plan has partial blocks, whose test needs registers of its own.
    """
    tile = SINGLE[width_of(head_dim)] if itemsize > 2 else tile_of("triton", chip, head_dim, intervals)
    rows = min(tile.rows, block)
    return {
        "BLOCK_D": triton.next_power_of_2(max(head_dim, 16)),
        "BLOCK_M": rows,
        "BLOCK_N": min(tile.keys, block),
        "num_stages": tile.stages,
        "num_warps": tile.warps if rows >= 64 else 4,
    }


def specialisation(
    head_dim: int, intervals: bool, tile: Tile, dtype: str
) -> tuple[triton.JITFunction, dict[str, Any], dict[str, str]]:
    """What ``triton_forward`` asks Triton for, to compile it ahead of time: the kernel, its constants, and types by parameter."""
    constants = {
        "D": head_dim, "BLOCK_D": triton.next_power_of_2(max(head_dim, 16)), "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
        "BLOCK": 128, "SHARED_SET": True, "HAS_HEAD_SET": False, "HAS_INTERVALS": intervals,
    }  # fmt: skip
    plan = ("q_start", "q_rows", "k_rows", "index", "key_start", "ends", "head_set", "key_encoding", "row_encoding")
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(plan, "*i32")
    return forward_kernel, constants, types | {"lse_ptr": "*fp32", "scale": "fp32"}


def triton_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Shapes as in ``block_sparse_attention``, which validates them."""
    B, Sq, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((B, H, Sq), dtype=torch.float32, device=q.device)
    config = launch_config(D, plan.block, q.element_size(), plan.row_encoding is not None, chip_of(q.device))
    per_set, q_blocks, longest = plan.sets, plan.index.shape[2], plan.index.shape[3]
    unused = plan.index  # a pointer that a specialised kernel never reads
    grid = (q_blocks * (plan.block // config["BLOCK_M"]), B * H)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[grid](
            q, k, v, out, lse,
            q.stride(0), q.stride(1), q.stride(2),
            k.stride(0), k.stride(1), k.stride(2),
            v.stride(0), v.stride(1), v.stride(2),
            out.stride(0), out.stride(1), out.stride(2),
            plan.q_start, plan.q_rows, plan.k_rows,
            plan.index, plan.key_start, plan.ends,
            unused if plan.head_set is None else plan.head_set,
            unused if plan.key_encoding is None else plan.key_encoding,
            unused if plan.row_encoding is None else plan.row_encoding,
            plan.guard_bits,
            0 if plan.index.shape[0] == 1 else per_set * q_blocks,
            per_set, q_blocks, longest,
            H, H // k.shape[2], Sq, scale * LOG2E.value,
            D=D, BLOCK=plan.block,
            SHARED_SET=per_set == 1, HAS_HEAD_SET=plan.head_set is not None, HAS_INTERVALS=plan.row_encoding is not None,
            **config,
        )  # fmt: skip
    return out, lse
