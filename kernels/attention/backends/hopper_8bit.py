"""Hopper forward kernel in 8 bits (Gluon, sm_90): the warp-specialised kernel of hopper.py with 8-bit operands.

What is multiplied was quantized by kernels/attention/quantize.py, block by block of the plan (scale c per query row, s and u per
key block):

    scores     x = c·s · (int8 q · int8 k)                 exact products, summed in 32-bit integers
    weights    w = exp2(x − b),  b the block's own row maximum
    values     o = (8-bit w) · (8-bit v)                   a sum over this block alone
    result     acc ← acc · exp2(b_before − b) · u_before/u + o,   row sum likewise; out = acc · u / row sum

w is int8 (round(127 w)) or e4m3 (256 w). Measured from its own block's maximum, it loses nothing to a larger weight elsewhere,
and each block's sum is added in fp32: neither the tensor core's short fp8 accumulator nor a long list costs precision. The
result is kept in units of the latest block (one multiply-add an element); b is held within 2⁴⁰ of the running maximum, so
that a block of small weights cannot overflow it.

A consumer issues the values of block j − 1 and the scores of block j together, adds up while the latter run, and leaves
its softmax to be covered by the other consumer's products.

Means that stand for keys which a list leaves out are further key blocks, as in hopper.py. A bias that all means of a block share
is added to the integer scores, in units of c·s: it is exact to half a unit, as the scores are. Where each mean has one of its
own, the scores are turned into fp32 first, so that no bias is rounded to those units.

An 8-bit operand in registers holds four neighbouring keys a thread, an accumulator two and two: the values' keys are stored in
the order that makes the weights' registers the operand's (``key_order`` in quantize.py), so that nothing is exchanged.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewise.kernels.attention.backends.hopper import BLOCK, HALF, LN2, LOG2E, LOG_2_E, _encoded_keys, _next
from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.attention.quantize import Quantized
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.mean_lists import every_block, with_rows_in_line

NOTHING = gl.constexpr(-(2**31))  # the score of a key that a row does not see
SMALLEST = gl.constexpr(2.0**-27)
DROP = gl.constexpr(40.0)
INT8_TOP = gl.constexpr(6.988684686772166)  # log2(127): the largest weight of a block is 127
FP8_TOP = gl.constexpr(8.0)  # 256, a power of two below e4m3's 448


@gluon.jit
def _produce(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty, index, count, first_block,
    mean_index, mean_count, first_mean, HAS_MEANS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of entries 1 … count − 1; those of entry 0 are already on their way. Then the means."""
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    stage, phase = _next(0, 0, STAGES)
    last = gl.maximum(count, 1) - 1  # a list without any entry is read at 0, as everywhere
    block = gl.load(index + gl.minimum(1, last))
    for j in range(1, count):
        # The next address is fetched while this block waits for its slot.
        following = gl.load(index + gl.minimum(j + 1, last))
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        row = (first_block + block) * BLOCK_N
        tma.async_copy_global_to_shared(k_desc, [row, 0], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        row = (first_block + block) * D
        tma.async_copy_global_to_shared(v_desc, [row, 0], v_full.index(stage), v_ring.index(stage))
        block = following
        stage, phase = _next(stage, phase, STAGES)
    if HAS_MEANS:
        for j in range(mean_count):
            block = first_block + first_mean + gl.load(mean_index + j)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [block * BLOCK_N, 0], k_full.index(stage), k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [block * D, 0], v_full.index(stage), v_ring.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _hide_rows(s, rows, LAYOUT: gl.constexpr):
    """Scores of a block's missing rows become NOTHING."""
    column = gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where((column < rows)[None, :], s, NOTHING)


@gluon.jit
def _hide_intervals(s, encoded, row_lo, row_hi, guard_bits):
    """Scores of keys outside the rows' intervals become NOTHING: two subtractions test six inequalities."""
    above = (encoded | guard_bits)[None, :] - row_lo[:, None]
    below = row_hi[:, None] - encoded[None, :]
    return gl.where((guard_bits & ~(above & below)) == 0, s, NOTHING)


@gluon.jit
def _units(bias, per_unit):
    """A bias (base 2) as a number of score units, ``per_unit`` of them a 1; within 2³⁰, far beyond any score."""
    number = bias * per_unit
    return gl.minimum(gl.maximum(number, -1073741824.0), 1073741824.0).to(gl.int32)


@gluon.jit
def _per_unit(unit):
    """How many score units are 1, of rows whose unit is at least SMALLEST: a division a row, not one for each of its scores."""
    return 1.0 / gl.maximum(unit, SMALLEST)


@gluon.jit
def _scaled(s, scale):
    """Integer scores in fp32 (base 2), −inf for NOTHING."""
    scale = gl.maximum(scale, SMALLEST)
    return gl.where(s == NOTHING, float("-inf"), s.to(gl.float32) * scale[:, None])


@gluon.jit
def _weigh(s, scale, row_max, base, MASKED: gl.constexpr, TOP: gl.constexpr):
    """Weights 2^(score − base′ + TOP) of a block, the new maximum and base′, and the factor for what was summed before.

    Integer scores, times ``scale``, stay so until here: of three the maximum is one instruction. fp32 ones have been scaled.
    """
    # A scale this small means scores that are all alike. NOTHING times it is still 16 below them, which rounds to 0.
    scale = gl.maximum(scale, SMALLEST)
    peak = gl.max(s, 1)
    if s.dtype == gl.float32:
        block_max = peak
    else:
        block_max = peak.to(gl.float32) * scale
        if MASKED:
            block_max = gl.where(peak == NOTHING, float("-inf"), block_max)
    row_max = gl.maximum(row_max, block_max)
    new = gl.maximum(block_max, row_max - DROP)
    start = new
    if MASKED:
        # A row that sees nothing here keeps to its maximum; one that has seen nothing at all has none, and is measured from 0.
        new = gl.where(block_max == float("-inf"), row_max, new)
        start = gl.where(new == float("-inf"), 0.0, new)
    if s.dtype == gl.float32:
        weights = gl.exp2(s - (start - TOP)[:, None])
    else:
        weights = gl.exp2(s.to(gl.float32) * scale[:, None] - (start - TOP)[:, None])
    return weights, row_max, new, gl.exp2(base - start)


@gluon.jit
def _narrow(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """fp32 weights as an 8-bit operand whose columns are in ``key_order``: every thread keeps its own four."""
    BLOCK_N: gl.constexpr = weights.shape[1]
    # 32 keys are 2 × 2 × 4 × 2: (high, low) group of eight, thread of the quad, its pair.
    parts = gl.permute(weights.reshape([HALF, BLOCK_N // 32, 2, 2, 4, 2]), [0, 1, 2, 4, 3, 5])
    ordered = gl.convert_layout(parts.reshape([HALF, BLOCK_N]), LAYOUT, assert_trivial=True)
    if dtype == gl.int8:
        # In fp16, adding 1024 rounds to the nearest integer and leaves it in the low byte.
        narrow = gl.inline_asm_elementwise(
            """{
            .reg .b32 h<3>;
            mov.b32 h2, 0x64006400;
            cvt.rn.f16x2.f32 h0, $2, $1;
            cvt.rn.f16x2.f32 h1, $4, $3;
            add.f16x2 h0, h0, h2;
            add.f16x2 h1, h1, h2;
            prmt.b32 $0, h0, h1, 0x6420;
            }""",
            "=r,r,r,r,r", [ordered], dtype=gl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        narrow = gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r", [ordered], dtype=gl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip
    return narrow


@gluon.jit
def _total(weights, p, LAYOUT: gl.constexpr):
    """Sum of a block's weights, row by row: of the int8 ones, four an instruction, or of the fp32 ones."""
    if p.dtype == gl.int8:
        # The sum of four is the first of four results; the others are never written, and split away here.
        fours = gl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $4, 0x01010101, 0;", "=r,=r,=r,=r,r", [p], dtype=gl.int32, is_pure=True, pack=4
        )
        pairs, _ = gl.split(fours.reshape([HALF, p.shape[1] // 4, 2, 2]))
        firsts, _ = gl.split(pairs)
        total = gl.convert_layout(gl.sum(firsts, 1).to(gl.float32), gl.SliceLayout(1, LAYOUT))
    else:
        total = gl.sum(weights, 1)
    return total


@gluon.jit
def _fade(acc, factor, o, LAYOUT: gl.constexpr):
    """acc · factor + o, row by row."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None] + o.to(gl.float32)


@gluon.jit
def _steps(
    acc, s, row_max, base, row_sum, begin, end, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, scale,
    first_mean, bias, means, even_bias,
    MASK_ROWS: gl.constexpr, MASK_INTERVALS: gl.constexpr, MEANS: gl.constexpr, STAGES: gl.constexpr, TOP: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Entries begin … end − 1 of the list: the scores of each, and the weights and values of the one before it.

    ``block``: number of entry begin. ``k_scale``, ``v_scale``: of the entry before it. ``v_unit``: of the one before that.
    MEANS: they are blocks of means, whose numbers begin at ``first_mean``: "even" ones with one bias, or "uneven" ones.
    """
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    SUM: gl.constexpr = gl.int32 if v_ring.dtype == gl.int8 else gl.float32
    for j in range(begin, end):
        # Numbers that the next entry needs are on their way for a whole step.
        following = gl.load(index + gl.minimum(j + 1, last))
        next_k_scale = gl.load(kv_scales + 2 * block)
        next_v_scale = gl.load(kv_scales + 2 * block + 1)
        if MEANS == "no":
            weights, row_max, base, fade = _weigh(s, scale * k_scale, row_max, base, MASK_ROWS, TOP)
        else:
            weights, row_max, base, fade = _weigh(s, scale * k_scale, row_max, base, True, TOP)
        p = _narrow(weights, v_ring.dtype, P_LAYOUT)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        o = warpgroup_mma(
            p, v_ring.index(v_stage).permute([1, 0]), gl.zeros([HALF, D], SUM, O_LAYOUT), use_acc=False, is_async=True
        )
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma(
            q,
            k_ring.index(k_stage).permute([1, 0]),
            gl.zeros([HALF, BLOCK_N], gl.int32, S_LAYOUT),
            use_acc=False,
            is_async=True,
        )
        row_sum = row_sum * fade + _total(weights, p, S_LAYOUT)
        o = warpgroup_mma_wait(1, deps=[o])
        mbarrier.arrive(v_empty.index(v_stage))
        acc = _fade(acc, fade * (v_unit / v_scale), o, O_LAYOUT)
        # What masks need is read now that the registers of ``o`` are free, before the products are waited for.
        if MASK_ROWS:
            rows = gl.load(k_rows + block)
        if MASK_INTERVALS:
            encoded = _encoded_keys(key_encoding, gl.load(key_start + j), rows, guard_bits, BLOCK_N, S_LAYOUT)
        if MEANS == "uneven":
            mean = (block - first_mean) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
            of_mean = gl.load(bias + mean, mask=mean < means, other=float("-inf")) * LOG_2_E
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(k_stage))
        if MASK_INTERVALS:
            s = _hide_intervals(s, encoded, row_lo, row_hi, guard_bits)
        elif MASK_ROWS:
            s = _hide_rows(s, rows, S_LAYOUT)
        if MEANS == "even":
            s += _units(even_bias, _per_unit(scale * next_k_scale))[:, None]
        elif MEANS == "uneven":
            s = s.to(gl.float32) * gl.maximum(scale * next_k_scale, SMALLEST)[:, None] + of_mean[None, :]
        block = following
        if MEANS != "no":
            block += first_mean
        v_unit = v_scale
        k_scale = next_k_scale
        v_scale = next_v_scale
        k_stage, k_phase = _next(k_stage, k_phase, STAGES)
        v_stage, v_phase = _next(v_stage, v_phase, STAGES)
    return acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit


@gluon.jit
def _consume(
    q_smem, o_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    out_ptr, lse_ptr, stride_os, index, key_start, k_rows, q_facts, kv_scales, v_facts,
    key_encoding, row_lo_ptr, row_hi_ptr, guard_bits, complete_end, ragged_end, partial_end, query, rows, scale,
    mean_index, even_means, mean_count, first_mean, bias, means, even_bias,
    WHO: gl.constexpr, HAS_INTERVALS: gl.constexpr, HAS_MEANS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    INTEGER: gl.constexpr = v_ring.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if INTEGER else gl.float32
    TOP: gl.constexpr = INT8_TOP if INTEGER else FP8_TOP

    q = q_smem.index(WHO)
    local = WHO * HALF + gl.arange(0, HALF, ROW)
    row_scale = gl.load(q_facts + local) * scale
    row_lo = local
    row_hi = local
    if HAS_INTERVALS:
        row_lo = gl.load(row_lo_ptr + query + local, mask=local < rows, other=0)
        row_hi = gl.load(row_hi_ptr + query + local, mask=local < rows, other=0)
    row_max = gl.full([HALF], float("-inf"), gl.float32, ROW)
    base = row_max
    row_sum = gl.zeros([HALF], gl.float32, ROW)
    acc = gl.zeros([HALF, D], gl.float32, O_LAYOUT)

    # The scores of the first block alone, with every mask: there is nothing yet to overlap them with. A list without any
    # entry is run as one of a block without rows.
    last = gl.maximum(partial_end, 1) - 1
    block = gl.load(index)
    k_scale = gl.load(kv_scales + 2 * block)
    v_scale = gl.load(kv_scales + 2 * block + 1)
    v_unit = v_scale
    first_rows = gl.where(partial_end > 0, gl.load(k_rows + block), 0)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(
        q,
        k_ring.index(0).permute([1, 0]),
        gl.zeros([HALF, BLOCK_N], gl.int32, S_LAYOUT),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    if complete_end == 0:
        s = _hide_rows(s, first_rows, S_LAYOUT)
        if HAS_INTERVALS:  # noqa: SIM102 (decided when compiling, the next at run time)
            if ragged_end == 0:
                encoded = _encoded_keys(key_encoding, gl.load(key_start), first_rows, guard_bits, BLOCK_N, S_LAYOUT)
                s = _hide_intervals(s, encoded, row_lo, row_hi, guard_bits)

    k_stage, k_phase = _next(0, 0, STAGES)
    v_stage = 0
    v_phase = 0
    block = gl.load(index + gl.minimum(1, last))
    acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit = _steps(
        acc, s, row_max, base, row_sum, 1, complete_end,
        k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
        q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, row_scale,
        first_mean, bias, means, even_bias, False, False, "no", STAGES, TOP, S_LAYOUT, O_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit = _steps(
        acc, s, row_max, base, row_sum, gl.maximum(complete_end, 1), ragged_end,
        k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
        q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, row_scale,
        first_mean, bias, means, even_bias, True, False, "no", STAGES, TOP, S_LAYOUT, O_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    if HAS_INTERVALS:
        acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit = _steps(
            acc, s, row_max, base, row_sum, gl.maximum(ragged_end, 1), partial_end,
            k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, row_scale,
            first_mean, bias, means, even_bias, True, True, "no", STAGES, TOP, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    if HAS_MEANS:
        block = first_mean + gl.load(mean_index)
        last = gl.maximum(mean_count, 1) - 1
        acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit = _steps(
            acc, s, row_max, base, row_sum, 0, even_means,
            k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            mean_index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, row_scale,
            first_mean, bias, means, even_bias, False, False, "even", STAGES, TOP, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        s = _scaled(s, row_scale * k_scale)
        acc, s, row_max, base, row_sum, k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit = _steps(
            acc, s, row_max, base, row_sum, even_means, mean_count,
            k_stage, k_phase, v_stage, v_phase, block, k_scale, v_scale, v_unit,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            mean_index, last, key_start, k_rows, kv_scales, key_encoding, row_lo, row_hi, guard_bits, row_scale,
            first_mean, bias, means, even_bias, False, False, "uneven", STAGES, TOP, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    weights, row_max, base, fade = _weigh(s, row_scale * k_scale, row_max, base, True, TOP)
    p = _narrow(weights, v_ring.dtype, P_LAYOUT)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    o = warpgroup_mma(
        p, v_ring.index(v_stage).permute([1, 0]), gl.zeros([HALF, D], SUM, O_LAYOUT), use_acc=False, is_async=True
    )
    row_sum = row_sum * fade + _total(weights, p, S_LAYOUT)
    o = warpgroup_mma_wait(0, deps=[o])
    acc = _fade(acc, fade * (v_unit / v_scale), o, O_LAYOUT)

    # A row that saw no key: output 0, log-sum-exp −inf.
    seen = row_sum > 0
    whole = gl.where(seen, row_sum, 1.0)
    shift = gl.load(q_facts + 2 * HALF + local)
    lse = gl.where(seen, (base + gl.log2(whole) - TOP) * LN2 + shift, float("-inf"))
    gl.store(lse_ptr + query + local, lse, mask=local < rows)
    # The weights sum to 1: the mean that was taken from the values comes back whole.
    column = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    spread = gl.load(v_facts + column)
    mean = gl.load(v_facts + D + column)
    inverse = gl.convert_layout(gl.where(seen, v_scale / whole, 0.0), gl.SliceLayout(1, O_LAYOUT))
    whether = gl.convert_layout(gl.where(seen, 1.0, 0.0), gl.SliceLayout(1, O_LAYOUT))
    acc = acc * inverse[:, None] * spread[None, :] + whether[:, None] * mean[None, :]
    # Through shared memory, so that each thread writes 16 consecutive bytes.
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    staged = o_smem.index(WHO)
    staged.store(acc.to(o_smem.dtype))
    out = staged.load(STORE)
    row = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    at = (query + row).to(gl.int64)[:, None] * stride_os + gl.arange(0, D, gl.SliceLayout(0, STORE))[None, :]
    gl.store(out_ptr + at, out, mask=(row < rows)[:, None])


@gluon.jit
def hopper_8bit_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, stride_ob, stride_os, stride_oh,
    q_facts, kv_scales, v_facts,
    q_start, q_rows, k_rows, index, key_start, ends, head_set, key_encoding, row_encoding, guard_bits,
    stride_plan, q_blocks, k_blocks, longest, heads, group, q_len, scale,
    mean_index, mean_ends, bias, stride_mean_set, stride_mean_block, stride_bias_b, stride_bias_h, means, first_mean, even_bias,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHARED_SET: gl.constexpr, HAS_HEAD_SET: gl.constexpr,
    HAS_INTERVALS: gl.constexpr, HAS_MEANS: gl.constexpr, O_SHARED: gl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, batch × heads). ``scale`` and ``even_bias`` include log2(e). Means: as in ``hopper_kernel``; the
    blocks of theirs are the key blocks from ``first_mean`` on."""
    block = gl.program_id(0)
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    if SHARED_SET:
        set_of_head = head * 0
    elif HAS_HEAD_SET:
        set_of_head = gl.load(head_set + head)
    else:
        set_of_head = head
    query = gl.load(q_start + block)
    rows = gl.load(q_rows + block)
    # stride_plan is 0 for a plan that all samples share.
    listing = batch.to(gl.int64) * stride_plan + set_of_head * q_blocks + block
    complete_end = gl.load(ends + listing * 3)
    ragged_end = gl.load(ends + listing * 3 + 1)
    partial_end = gl.load(ends + listing * 3 + 2)
    index += listing * longest
    key_start += listing * longest
    out_ptr += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += (batch.to(gl.int64) * heads + head) * q_len
    row_lo = row_encoding + set_of_head.to(gl.int64) * 2 * q_len
    row_hi = row_lo + q_len
    even_means = 0
    mean_count = 0
    if HAS_MEANS:
        listing = set_of_head * stride_mean_set + block * stride_mean_block
        even_means = gl.load(mean_ends + listing * 2)
        mean_count = gl.load(mean_ends + listing * 2 + 1)
        mean_index += listing * ((means + BLOCK_N - 1) // BLOCK_N)
        bias += batch.to(gl.int64) * stride_bias_b + head.to(gl.int64) * stride_bias_h + block.to(gl.int64) * means
    # Blocks of all samples and heads one after another, each with room for BLOCK_N rows.
    first_query = (gl.program_id(1) * q_blocks + block) * BLOCK_N
    key_head = batch * (heads // group) + head // group
    first_block = key_head * k_blocks
    q_facts += 2 * first_query
    kv_scales += 2 * first_block
    v_facts += 2 * key_head * D

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    o_smem = gl.allocate_shared_memory(out_ptr.dtype.element_ty, [2, HALF, D], O_SHARED)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BLOCK_N], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    for who in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [first_query + who * HALF, 0], q_full, q_smem.index(who))
    # The first keys and values too, before the other warps are started.
    first_key = first_block + gl.load(index)
    mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [first_key * BLOCK_N, 0], k_full.index(0), k_ring.index(0))
    mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [first_key * D, 0], v_full.index(0), v_ring.index(0))

    # Written out in place: a local name would turn the constants among the arguments into run-time values.
    gl.warp_specialize(
        [
            (_consume, (
                q_smem, o_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, stride_os,
                index, key_start, k_rows, q_facts, kv_scales, v_facts,
                key_encoding, row_lo, row_hi, guard_bits, complete_end, ragged_end, partial_end, query, rows, scale,
                mean_index, even_means, mean_count, first_mean, bias, means, even_bias, 0, HAS_INTERVALS, HAS_MEANS, STAGES,
            )),
            (_consume, (
                q_smem, o_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, stride_os,
                index, key_start, k_rows, q_facts, kv_scales, v_facts,
                key_encoding, row_lo, row_hi, guard_bits, complete_end, ragged_end, partial_end, query, rows, scale,
                mean_index, even_means, mean_count, first_mean, bias, means, even_bias, 1, HAS_INTERVALS, HAS_MEANS, STAGES,
            )),
            (_produce, (
                k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty, index, partial_end, first_block,
                mean_index, mean_count, first_mean, HAS_MEANS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper_8bit_forward(
    x: Quantized,
    plan: BlockPlan,
    scale: float,
    q_len: int,
    dtype: torch.dtype,
    means: BlockCompensation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on what ``quantize`` made of q, k and v: (B, q_len, H, D) in ``dtype``, log-sum-exp (B, H, q_len).

    means: whose blocks are behind those of the keys.
    """
    B, H, Nq, _, D = x.q.shape
    Hk, Nk = x.k.shape[1:3]
    device = x.q.device
    out = torch.empty((B, q_len, H, D), dtype=dtype, device=device)
    lse = torch.empty((B, H, q_len), dtype=torch.float32, device=device)
    per_set, longest = plan.sets, plan.index.shape[3]
    unused = plan.index  # a pointer that a specialised kernel never reads
    lists, bias = None, unused
    if means is not None:
        lists = means.lists or every_block(means.key_mean.shape[1], device)
        bias = with_rows_in_line(means.bias)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        hopper_8bit_kernel[(Nq, B * H)](
            _descriptor(x.q, HALF.value), _descriptor(x.k, BLOCK), _descriptor(x.v, D), out, lse,
            out.stride(0), out.stride(1), out.stride(2),
            x.q_facts, x.kv_scales, x.v_facts,
            plan.q_start, plan.q_rows, plan.k_rows, plan.index, plan.key_start, plan.ends,
            unused if plan.head_set is None else plan.head_set,
            unused if plan.key_encoding is None else plan.key_encoding,
            unused if plan.row_encoding is None else plan.row_encoding,
            plan.guard_bits,
            0 if plan.index.shape[0] == 1 else per_set * Nq,
            Nq, Nk, longest, H, H // Hk, q_len, scale * LOG2E,
            unused if lists is None else lists.index, unused if lists is None else lists.ends, bias,
            *((0, 0) if lists is None else lists.strides), bias.stride(0), bias.stride(1),
            bias.shape[3], len(plan.k_start), 0.0 if lists is None else lists.even_bias * LOG2E,
            D=D, BLOCK_N=BLOCK,
            SHARED_SET=per_set == 1, HAS_HEAD_SET=plan.head_set is not None, HAS_INTERVALS=plan.row_encoding is not None,
            HAS_MEANS=means is not None,
            O_SHARED=gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
            num_warps=4, **launch_config(D),
        )  # fmt: skip
    return out, lse


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """(…, R, C) 8-bit elements as a matrix of rows of C, read in pieces of ``rows`` × C."""
    columns = x.shape[-1]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns, element_bitwidth=8, rank=2)
    return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], [rows, columns], layout)


def launch_config(head_dim: int) -> dict[str, int]:
    """Slots of each ring of shared memory. STA 30×48×80, 24 heads on an H200: int8 17.4 ms with 2, 17.8 with 3, 17.9 with 4."""
    return {"STAGES": 2 if head_dim == 128 else 3}
