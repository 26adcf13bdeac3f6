"""Portable Triton forward kernel in 8 bits: executes any BlockPlan in one launch (sm_80 and later).

What is multiplied was quantized by kernels/attention/quantize.py, block by block of the plan (scale c per query row, s and u per
key block). For each piece of BLOCK_N keys, with its own row maximum b, as in hopper_8bit.py:

    scores     x = c·s · (int8 q · int8 k)
    weights    w = exp2(x − b + TOP)              8-bit: int8 (of 127) or e4m3 (of 256)
    values     o = (8-bit w) · (8-bit v)
    result     acc ← acc · exp2(b_before − b) · u_before/u + o,   row sum likewise; out = acc · u / row sum

Three details save most of the work beside the products:

- The integer product starts from the bits of 1.5 · 2²³, so that its result, read as fp32, is 1.5 · 2²³ + x/(c·s) exactly
  (|q·k| ≤ 127² · 128 < 2²¹): no conversion, and the constant leaves in the exponent's multiply-add. Integers of this kind are
  ordered as their floats are; the bits of −∞ hide a key.
- Values are stored with their keys in ``key_order``, so that the weights are in the registers where the next product reads them.
- Rounded weights are summed by a product with ones.

The channels are summed in two halves, one after the other: the second product's result takes the registers of the first one's,
which on Hopper leaves room for a third program on a multiprocessor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilewise.kernels.attention.backends.tiles import Tile, tile_of
from tilewise.kernels.attention.quantize import Quantized
from tilewise.kernels.chips import Chip, chip_of
from tilewise.kernels.plans.block_plan import BlockPlan

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2²³
INTEGER_BITS = tl.constexpr(0x4B400000)
HIDDEN_BITS = tl.constexpr(-8388608)  # 0xFF800000, fp32 −∞
SMALLEST = tl.constexpr(2.0**-27)  # a scale this small means scores that are all alike
DROP = tl.constexpr(40.0)
INT8_TOP = tl.constexpr(6.988684686772166)  # log2(127): the largest weight of a piece is 127
FP8_TOP = tl.constexpr(8.0)  # 256, a power of two below e4m3's 448


@triton.jit
def _to_int8(weights, INTERPRETED: tl.constexpr):
    """Nearest integers of weights in [0, 127]."""
    if INTERPRETED:
        narrow = (weights + INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # In fp16, adding 1024 rounds to the nearest integer and leaves it in the low byte.
        narrow = tl.inline_asm_elementwise(
            """{
            .reg .b32 h<3>;
            mov.b32 h2, 0x64006400;
            cvt.rn.f16x2.f32 h0, $2, $1;
            cvt.rn.f16x2.f32 h1, $4, $3;
            add.f16x2 h0, h0, h2;
            add.f16x2 h1, h1, h2;
            prmt.b32 $0, h0, h1, 0x6420;
            }""",
            "=r,r,r,r,r", [weights], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return narrow


@triton.jit
def _product(p, v):
    """p v of 8-bit operands, in fp32."""
    if v.dtype == tl.int8:
        o = tl.dot(p, v, out_dtype=tl.int32).to(tl.float32)
    else:
        o = tl.dot(p, v)
    return o


@triton.jit
def _attend_8bit(
    low, high, row_max, base, row_sum, v_unit, q, row_scale,
    k_base, v_base, kv_scales, index, key_start, k_rows,
    key_encoding, row_lo, row_hi, guard_bits, begin, end,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_INTERVALS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Entries begin … end − 1 of one list. ``v_unit``: u of the entry before. ``base``: b of the piece before.
    ``low``, ``high``: what was summed, (BLOCK_M, D/2) each."""
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    IS_INT8: tl.constexpr = v_base.dtype.element_ty == tl.int8
    TOP: tl.constexpr = INT8_TOP if IS_INT8 else FP8_TOP
    columns = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, D)
    half = tl.arange(0, D // 2)
    for piece in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
        entry = piece // PARTS
        offset = (piece % PARTS) * BLOCK_N
        block = tl.load(index + entry)
        k_unit = tl.load(kv_scales + 2 * block)
        unit = tl.load(kv_scales + 2 * block + 1)
        at = block.to(tl.int64) * (BLOCK * D)
        k = tl.load(k_base + at + (offset + columns)[None, :] * D + depth[:, None])
        v_at = v_base + at + half[None, :] * BLOCK + (offset + columns)[:, None]
        v_low = tl.load(v_at)
        v_high = tl.load(v_at + D // 2 * BLOCK)
        s = tl.dot(q, k, tl.full([BLOCK_M, BLOCK_N], INTEGER_BITS, tl.int32), out_dtype=tl.int32)
        if MASK_ROWS:
            inside = columns < tl.load(k_rows + block) - offset
        if MASK_INTERVALS:
            # Two subtractions test six inequalities, and the block's missing rows too: see kernels/plans/interval_encoding.py.
            keys = tl.load(key_start + entry).to(tl.int64) + offset + columns
            encoded = tl.load(key_encoding + keys, mask=inside, other=guard_bits)
            above = (encoded | guard_bits)[None, :] - row_lo[:, None]
            below = row_hi[:, None] - encoded[None, :]
            s = tl.where((guard_bits & ~(above & below)) == 0, s, HIDDEN_BITS)
        elif MASK_ROWS:
            s = tl.where(inside[None, :], s, HIDDEN_BITS)
        scale = tl.maximum(row_scale * k_unit, SMALLEST)
        piece_max = (tl.max(s, 1).to(tl.float32, bitcast=True) - INTEGER) * scale
        row_max = tl.maximum(row_max, piece_max)
        # Within 2⁴⁰ of the running maximum, so that a piece of small weights cannot overflow the sum in its units.
        new = tl.maximum(piece_max, row_max - DROP)
        start = new
        if MASK_ROWS:
            # A row that sees nothing here keeps to its maximum; one that has seen nothing at all is measured from 0.
            new = tl.where(piece_max == float("-inf"), row_max, new)
            start = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(s.to(tl.float32, bitcast=True) * scale[:, None] - (start - TOP + INTEGER * scale)[:, None])
        fade = tl.exp2(base - start)
        base = new
        # Keys of 32 columns are 2 × 2 × 4 × 2, (high, low) group of eight, thread of four, its pair: brought into ``key_order``.
        parts = tl.permute(tl.reshape(weights, [BLOCK_M, BLOCK_N // 32, 2, 2, 4, 2]), [0, 1, 2, 4, 3, 5])
        ordered = tl.reshape(parts, [BLOCK_M, BLOCK_N])
        if IS_INT8:
            p = _to_int8(ordered, INTERPRETED)
            ones = tl.full([BLOCK_N, 8], 1, tl.int8)
            total = tl.max(tl.dot(p, ones, out_dtype=tl.int32), 1).to(tl.float32)
        else:
            p = ordered.to(v_base.dtype.element_ty)
            total = tl.sum(weights, 1)
        row_sum = row_sum * fade + total
        rescale = (fade * (v_unit / unit))[:, None]
        low = low * rescale + _product(p, v_low)
        high = high * rescale + _product(p, v_high)
        v_unit = unit
    return low, high, row_max, base, row_sum, v_unit


@triton.jit
def _store(acc, unit, seen, in_block, out_at, v_facts, first, D: tl.constexpr):
    """Half of the channels, from ``first`` on. The weights sum to 1: the mean taken from the values comes back whole."""
    channel = first + tl.arange(0, D // 2)
    out = acc * unit[:, None] * tl.load(v_facts + channel)[None, :] + tl.load(v_facts + D + channel)[None, :]
    out = tl.where(seen[:, None], out, 0.0)
    tl.store(out_at[:, None] + channel[None, :], out.to(out_at.dtype.element_ty), mask=in_block[:, None])


@triton.jit
def forward_8bit_kernel(
    q_ptr, q_facts, k_ptr, v_ptr, kv_scales, v_facts, out_ptr, lse_ptr,
    stride_ob, stride_os, stride_oh,
    q_start, q_rows, k_rows, index, key_start, ends, head_set, key_encoding, row_encoding, guard_bits,
    stride_plan, q_blocks, k_blocks, longest, heads, group, q_len, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SHARED_SET: tl.constexpr, HAS_HEAD_SET: tl.constexpr, HAS_INTERVALS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks × pieces of BLOCK_M rows, batch × heads). ``scale`` includes log2(e)."""
    SPLIT: tl.constexpr = BLOCK // BLOCK_M
    TOP: tl.constexpr = INT8_TOP if v_ptr.dtype.element_ty == tl.int8 else FP8_TOP
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
    depth = tl.arange(0, D)
    in_block = row < rows
    queries = tl.load(q_start + block).to(tl.int64) + offset + row
    # Blocks of all samples and heads one after another, each with room for BLOCK rows; missing rows are 0.
    first = (batch * heads + head) * q_blocks + block
    q = tl.load(q_ptr + (first * BLOCK + offset + row)[:, None] * D + depth[None, :])
    facts = q_facts + first * 2 * BLOCK + offset + row
    row_scale = tl.load(facts) * scale
    key_head = batch * (heads // group) + head // group
    k_base = k_ptr + key_head * k_blocks * BLOCK * D
    v_base = v_ptr + key_head * k_blocks * BLOCK * D
    kv_scales += key_head * k_blocks * 2
    v_facts += key_head * 2 * D

    # stride_plan is 0 for a plan that all samples share.
    listing = batch * stride_plan + set_of_head * q_blocks + block
    complete_end = tl.load(ends + listing * 3)
    ragged_end = tl.load(ends + listing * 3 + 1)
    partial_end = tl.load(ends + listing * 3 + 2)
    index += listing * longest
    key_start += listing * longest

    low = tl.zeros([BLOCK_M, D // 2], dtype=tl.float32)
    high = low
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    base = row_max
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    v_unit = tl.load(kv_scales + 1)  # of any block: nothing has been summed
    low, high, row_max, base, row_sum, v_unit = _attend_8bit(
        low, high, row_max, base, row_sum, v_unit, q, row_scale, k_base, v_base, kv_scales, index, key_start, k_rows,
        key_encoding, row, row, guard_bits, 0, complete_end,
        D, BLOCK, BLOCK_M, BLOCK_N, STAGES, False, False, INTERPRETED,
    )  # fmt: skip
    low, high, row_max, base, row_sum, v_unit = _attend_8bit(
        low, high, row_max, base, row_sum, v_unit, q, row_scale, k_base, v_base, kv_scales, index, key_start, k_rows,
        key_encoding, row, row, guard_bits, complete_end, ragged_end,
        D, BLOCK, BLOCK_M, BLOCK_N, STAGES, True, False, INTERPRETED,
    )  # fmt: skip
    if HAS_INTERVALS:
        row_encoding_at = row_encoding + set_of_head * 2 * q_len + queries
        row_lo = tl.load(row_encoding_at, mask=in_block, other=0)
        row_hi = tl.load(row_encoding_at + q_len, mask=in_block, other=0)
        low, high, row_max, base, row_sum, v_unit = _attend_8bit(
            low, high, row_max, base, row_sum, v_unit, q, row_scale, k_base, v_base, kv_scales, index, key_start, k_rows,
            key_encoding, row_lo, row_hi, guard_bits, ragged_end, partial_end,
            D, BLOCK, BLOCK_M, BLOCK_N, STAGES, True, True, INTERPRETED,
        )  # fmt: skip

    # A row that saw no key: output 0, log-sum-exp −inf.
    seen = row_sum > 0
    whole = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (base + tl.log2(whole) - TOP) * LN2 + tl.load(facts + BLOCK), float("-inf"))
    tl.store(lse_ptr + (batch * heads + head) * q_len + queries, lse, mask=in_block)
    unit = v_unit / whole
    out_at = out_ptr + batch * stride_ob + head * stride_oh + queries * stride_os
    _store(low, unit, seen, in_block, out_at, v_facts, 0, D)
    _store(high, unit, seen, in_block, out_at, v_facts, D // 2, D)


def launch_config(head_dim: int, block: int, intervals: bool, chip: Chip, dtype: str) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages for plans whose blocks have room for ``block`` rows: those of ``tiles.py``."""
    tile = tile_of("triton-8bit", chip, head_dim, intervals)
    rows = min(tile.rows, block)
    options = tile.options(dtype) if rows == tile.rows else {"num_warps": 4}
    return {"BLOCK_M": rows, "BLOCK_N": min(tile.keys, block), "STAGES": tile.stages, **options}


def specialisation(
    head_dim: int, intervals: bool, tile: Tile, dtype: str
) -> tuple[triton.JITFunction, dict[str, Any], dict[str, str]]:
    """What ``triton_8bit_forward`` asks Triton for, to compile it ahead of time: the kernel, its constants, types by parameter.

    dtype: of weights and values, "int8" or "fp8"."""
    constants = {
        "D": head_dim, "BLOCK": 128, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "STAGES": tile.stages, "SHARED_SET": True,
        "HAS_HEAD_SET": False, "HAS_INTERVALS": intervals, "INTERPRETED": False,
    }  # fmt: skip
    plan = ("q_start", "q_rows", "k_rows", "index", "key_start", "ends", "head_set", "key_encoding", "row_encoding")
    types = dict.fromkeys(plan, "*i32") | dict.fromkeys(("q_facts", "kv_scales", "v_facts", "lse_ptr"), "*fp32")
    values = {"int8": "*i8", "fp8": "*fp8e4nv"}[dtype]
    types |= {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": values, "out_ptr": "*bf16", "scale": "fp32"}
    return forward_8bit_kernel, constants, types


def triton_8bit_forward(
    x: Quantized, plan: BlockPlan, scale: float, q_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on what ``quantize`` made of q, k and v: (B, q_len, H, D) in ``dtype``, log-sum-exp (B, H, q_len)."""
    B, H, Nq, _, D = x.q.shape
    Hk, Nk = x.k.shape[1:3]
    device = x.q.device
    out = torch.empty((B, q_len, H, D), dtype=dtype, device=device)
    lse = torch.empty((B, H, q_len), dtype=torch.float32, device=device)
    unused = plan.index  # a pointer that a specialised kernel never reads
    values = "int8" if x.v.dtype == torch.int8 else "fp8"
    config = launch_config(D, plan.block, plan.row_encoding is not None, chip_of(device), values)
    if device.type == "cpu":  # in the interpreter, weights of a whole block at once, as in the naive path
        config["BLOCK_N"] = plan.block
    with torch.cuda.device_of(out):  # Triton launches on the current device
        forward_8bit_kernel[(Nq * (plan.block // config["BLOCK_M"]), B * H)](
            x.q, x.q_facts, x.k, x.v, x.kv_scales, x.v_facts, out, lse,
            out.stride(0), out.stride(1), out.stride(2),
            plan.q_start, plan.q_rows, plan.k_rows, plan.index, plan.key_start, plan.ends,
            unused if plan.head_set is None else plan.head_set,
            unused if plan.key_encoding is None else plan.key_encoding,
            unused if plan.row_encoding is None else plan.row_encoding,
            plan.guard_bits,
            0 if plan.index.shape[0] == 1 else plan.sets * Nq, Nq, Nk, plan.index.shape[3], H, H // Hk, q_len, scale * LOG2E,
            D=D, BLOCK=plan.block, SHARED_SET=plan.sets == 1, HAS_HEAD_SET=plan.head_set is not None,
            HAS_INTERVALS=plan.row_encoding is not None, INTERPRETED=device.type == "cpu",
            **config,
        )  # fmt: skip
    return out, lse
