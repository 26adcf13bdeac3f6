"""Hopper forward kernel (Gluon: explicit wgmma, TMA and warp specialisation): executes any BlockPlan in one launch, sm_90.

One thread block computes 128 query rows of one head with three groups of warps (FlashAttention-3, arXiv 2407.08608, §3.1–3.2):

    producer      1 warp    reads the plan's list and copies key and value blocks into two rings of shared memory
    consumer 0    4 warps   query rows 0 … 63: online softmax in base 2, accumulator in registers
    consumer 1    4 warps   query rows 64 … 127

A consumer issues the scores of block j and the values of block j − 1 together and does its softmax while the latter run; the
other consumer's softmax fills the rest. Because the producer reads the list ahead, an indirect block address costs nothing.

Means may stand for keys that a list leaves out (block_compensation.py): they are further key blocks, 128 means each, with a bias
on every score. Where that is the same for a whole block, as where a window leaves out cells of equal size, it is not added to
scores but subtracted from the maximum before and added after, once for all such blocks.

Key blocks are copied with their full room of rows whatever their size: rows that belong to the next block are masked in the
scores. Their values are multiplied by a weight of 0, so they must be finite, as attention inputs are.
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

from tilewise.kernels.attention.block_compensation import BlockCompensation
from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.mean_lists import every_block, with_rows_in_line

LOG2E = 1.4426950408889634
LOG_2_E = gl.constexpr(LOG2E)  # in a kernel
LN2 = gl.constexpr(0.6931471805599453)
BLOCK = 128  # rows of a query and of a key block
HALF = gl.constexpr(64)  # rows of one consumer: what one wgmma of four warps covers


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The following slot of a ring, and the parity of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty, key_start, count, first_row, column,
    mean_k_desc, mean_v_desc, mean_index, mean_count, first_mean, HAS_MEANS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of entries 1 … count − 1; those of entry 0 are already on their way. Then the means."""
    stage, phase = _next(0, 0, STAGES)
    last = gl.maximum(count, 1) - 1  # a list without any entry is read at 0, as everywhere
    row = gl.load(key_start + gl.minimum(1, last))
    for j in range(1, count):
        # The next address is fetched while this block waits for its slot.
        following = gl.load(key_start + gl.minimum(j + 1, last))
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [first_row + row, column], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [first_row + row, column], v_full.index(stage), v_ring.index(stage))
        row = following
        stage, phase = _next(stage, phase, STAGES)
    if HAS_MEANS:
        for j in range(mean_count):
            row = first_mean + gl.load(mean_index + j) * k_ring.shape[1]
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(mean_k_desc, [row, column], k_full.index(stage), k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(mean_v_desc, [row, column], v_full.index(stage), v_ring.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _encoded_keys(key_encoding, keys, rows, guard_bits, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Encoded coordinates of a block's keys; the rows that it lacks get an encoding that no interval holds."""
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    return gl.load(key_encoding + keys + column, mask=column < rows, other=guard_bits)


@gluon.jit
def _mask_rows(s, rows, LAYOUT: gl.constexpr):
    """Scores of a block's missing rows become −inf."""
    column = gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where((column < rows)[None, :], s, float("-inf"))


@gluon.jit
def _mask_intervals(s, encoded, row_lo, row_hi, guard_bits):
    """Scores of keys outside the rows' intervals become −inf: two subtractions test six inequalities (interval_encoding.py)."""
    above = (encoded | guard_bits)[None, :] - row_lo[:, None]
    below = row_hi[:, None] - encoded[None, :]
    return gl.where((guard_bits & ~(above & below)) == 0, s, float("-inf"))


@gluon.jit
def _softmax(s, row_max, row_sum, scale, MASKED: gl.constexpr):
    """One step of the online softmax: weights, new maximum and sum, and the factor for what was summed before."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    base = new_max
    if MASKED:
        # A row may have seen nothing yet; −inf − −inf is NaN, so it is measured from 0 until it has.
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(s * scale - base[:, None])
    rescale = gl.exp2(row_max - base)
    return weights, new_max, row_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _narrow(weights, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """fp32 weights as a 16-bit operand. Two at a time by hand: one at a time, their halves are swapped and swapped back."""
    if dtype == gl.bfloat16:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weights], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weights], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(pairs, LAYOUT)


@gluon.jit
def _steps(
    acc, p, row_max, row_sum, begin, end, k_stage, k_phase, v_stage, v_phase,
    q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
    MASK_ROWS: gl.constexpr, MASK_INTERVALS: gl.constexpr, BIAS: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Entries begin … end − 1 of the list: the scores of each, and the values of the one before it.

    BIAS: they are blocks of means, each of which has a ``bias``; ``means`` is how many there are.
    """
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    empty = gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT)
    for j in range(begin, end):
        # What masks need is read before the products are waited for.
        if MASK_ROWS:
            rows = gl.load(k_rows + gl.load(index + j))
        if MASK_INTERVALS:
            encoded = _encoded_keys(key_encoding, gl.load(key_start + j), rows, guard_bits, BLOCK_N, S_LAYOUT)
        if BIAS:
            mean = gl.load(index + j) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
            of_mean = gl.load(bias + mean, mask=mean < means, other=float("-inf")) * LOG_2_E
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma(q, k_ring.index(k_stage).permute([1, 0]), empty, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(p, v_ring.index(v_stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(k_stage))
        if MASK_INTERVALS:
            s = _mask_intervals(s, encoded, row_lo, row_hi, guard_bits)
        elif MASK_ROWS:
            s = _mask_rows(s, rows, S_LAYOUT)
        if BIAS:
            s = s * scale + of_mean[None, :]
            weights, row_max, row_sum, rescale = _softmax(s, row_max, row_sum, 1.0, True)
        else:
            weights, row_max, row_sum, rescale = _softmax(s, row_max, row_sum, scale, MASK_ROWS)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(v_stage))
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = _narrow(weights, v_ring.dtype, P_LAYOUT)
        k_stage, k_phase = _next(k_stage, k_phase, STAGES)
        v_stage, v_phase = _next(v_stage, v_phase, STAGES)
    return acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase


@gluon.jit
def _consume(
    q_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    out_ptr, lse_ptr, stride_os, index, key_start, k_rows, key_encoding, row_lo_ptr, row_hi_ptr, guard_bits,
    complete_end, ragged_end, partial_end, query, rows, scale, mean_index, even_means, mean_count, bias, means, even_bias,
    WHO: gl.constexpr, HAS_INTERVALS: gl.constexpr, HAS_MEANS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    D: gl.constexpr = k_ring.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)

    q = q_smem.index(WHO)
    local = WHO * HALF + gl.arange(0, HALF, ROW)
    row_lo = local
    row_hi = local
    if HAS_INTERVALS:
        row_lo = gl.load(row_lo_ptr + query + local, mask=local < rows, other=0)
        row_hi = gl.load(row_hi_ptr + query + local, mask=local < rows, other=0)
    row_max = gl.full([HALF], float("-inf"), gl.float32, ROW)
    row_sum = gl.zeros([HALF], gl.float32, ROW)
    acc = gl.zeros([HALF, D], gl.float32, O_LAYOUT)

    # The first block alone, with every mask: there is nothing yet to overlap it with. A list without any entry is run as one
    # of a block without rows.
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(
        q,
        k_ring.index(0).permute([1, 0]),
        gl.zeros([HALF, BLOCK_N], gl.float32, S_LAYOUT),
        use_acc=False,
        is_async=True,
    )
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    if complete_end == 0:
        first_rows = gl.where(partial_end > 0, gl.load(k_rows + gl.load(index)), 0)
        s = _mask_rows(s, first_rows, S_LAYOUT)
        if HAS_INTERVALS:  # noqa: SIM102 (decided when compiling, the next at run time)
            if ragged_end == 0:
                encoded = _encoded_keys(key_encoding, gl.load(key_start), first_rows, guard_bits, BLOCK_N, S_LAYOUT)
                s = _mask_intervals(s, encoded, row_lo, row_hi, guard_bits)
    weights, row_max, row_sum, _ = _softmax(s, row_max, row_sum, scale, True)
    p = _narrow(weights, v_ring.dtype, P_LAYOUT)

    k_stage, k_phase = _next(0, 0, STAGES)
    v_stage = 0
    v_phase = 0
    acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase = _steps(
        acc, p, row_max, row_sum, 1, complete_end, k_stage, k_phase, v_stage, v_phase,
        q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
        False, False, False, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase = _steps(
        acc, p, row_max, row_sum, gl.maximum(complete_end, 1), ragged_end, k_stage, k_phase, v_stage, v_phase,
        q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
        index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
        True, False, False, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
    )  # fmt: skip
    if HAS_INTERVALS:
        acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase = _steps(
            acc, p, row_max, row_sum, gl.maximum(ragged_end, 1), partial_end, k_stage, k_phase, v_stage, v_phase,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
            True, True, False, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    if HAS_MEANS:
        row_max -= even_bias
        acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase = _steps(
            acc, p, row_max, row_sum, 0, even_means, k_stage, k_phase, v_stage, v_phase,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            mean_index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
            False, False, False, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        row_max += even_bias
        acc, p, row_max, row_sum, k_stage, k_phase, v_stage, v_phase = _steps(
            acc, p, row_max, row_sum, even_means, mean_count, k_stage, k_phase, v_stage, v_phase,
            q, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            mean_index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits, scale, bias, means,
            False, False, True, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = warpgroup_mma(p, v_ring.index(v_stage), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    # A row that saw no key: output 0, log-sum-exp −inf.
    seen = row_sum > 0
    whole = gl.where(seen, row_sum, 1.0)
    acc = acc * gl.convert_layout(1.0 / whole, gl.SliceLayout(1, O_LAYOUT))[:, None]
    lse = gl.where(seen, (row_max + gl.log2(whole)) * LN2, float("-inf"))
    gl.store(lse_ptr + query + local, lse, mask=local < rows)
    # Through shared memory, where the queries were, so that each thread writes 16 consecutive bytes.
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    q.store(acc.to(q.dtype))
    out = q.load(STORE)
    row = WHO * HALF + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
    at = (query + row).to(gl.int64)[:, None] * stride_os + gl.arange(0, D, gl.SliceLayout(0, STORE))[None, :]
    gl.store(out_ptr + at, out, mask=(row < rows)[:, None])


@gluon.jit
def hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, stride_ob, stride_os, stride_oh,
    q_start, q_rows, k_rows, index, key_start, ends, head_set, key_encoding, row_encoding, guard_bits,
    stride_plan, q_blocks, longest, heads, group, q_len, k_len, scale,
    mean_k_desc, mean_v_desc, mean_index, mean_ends, bias, stride_mean_set, stride_mean_block, stride_bias_b, stride_bias_h,
    means, even_bias,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHARED_SET: gl.constexpr, HAS_HEAD_SET: gl.constexpr,
    HAS_INTERVALS: gl.constexpr, HAS_MEANS: gl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, batch × heads). ``scale`` and ``even_bias`` include log2(e), ``bias`` does not.

    mean_index: the blocks of 128 means that a query block sees, by set and query block (strides stride_mean_set and
    stride_mean_block), those of the even bias first. mean_ends: how many these are, and how many there are in all.
    bias: (batch, heads, query blocks, means) of the strides stride_bias_b, stride_bias_h, means and 1.
    """
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

    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], v_desc.layout)
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
        row = batch * q_len + query + who * HALF
        tma.async_copy_global_to_shared(q_desc, [row, head * D], q_full, q_smem.index(who))
    # The first keys and values too, before the other warps are started.
    first_key = batch * k_len + gl.load(key_start)
    column = head // group * D
    mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [first_key, column], k_full.index(0), k_ring.index(0))
    mbarrier.expect(v_full.index(0), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [first_key, column], v_full.index(0), v_ring.index(0))

    # Written out in place: a local name would turn the constants among the arguments into run-time values.
    gl.warp_specialize(
        [
            (_consume, (
                q_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, stride_os, index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits,
                complete_end, ragged_end, partial_end, query, rows, scale,
                mean_index, even_means, mean_count, bias, means, even_bias, 0, HAS_INTERVALS, HAS_MEANS, STAGES,
            )),
            (_consume, (
                q_smem, q_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                out_ptr, lse_ptr, stride_os, index, key_start, k_rows, key_encoding, row_lo, row_hi, guard_bits,
                complete_end, ragged_end, partial_end, query, rows, scale,
                mean_index, even_means, mean_count, bias, means, even_bias, 1, HAS_INTERVALS, HAS_MEANS, STAGES,
            )),
            (_produce, (
                k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                key_start, partial_end, batch * k_len, column,
                mean_k_desc, mean_v_desc, mean_index, mean_count, batch * means, HAS_MEANS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> str | None:
    """Why this kernel does not take these tensors or this plan, or None if it does. Shapes were validated before."""
    if q.shape[3] not in (64, 128):
        return f"head dimension {q.shape[3]} is not 64 or 128"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is not a 16-bit type"
    if plan.block != BLOCK:
        return f"the plan's blocks have room for {plan.block} rows, not {BLOCK}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[0] * x.shape[1] >= 2**31:
            return f"{name} has 2³¹ tokens or more"
    return None


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` (B, S, H, D) itself if it is a matrix of B·S evenly spaced rows with their heads side by side, as a projection or a
    chunk of a fused one is; otherwise a copy. The copy engine asks for that, and for 16-byte alignment."""
    B, S, H, D = x.shape
    side_by_side = (H == 1 or x.stride(2) == D) and (B == 1 or x.stride(0) == S * x.stride(1))
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) % 8 == 0
    return x if side_by_side and aligned else x.clone(memory_format=torch.contiguous_format)


SHARED_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """(B, S, H, D) as a matrix of B·S rows, read in pieces of ``rows`` × D."""
    B, S, H, D = x.shape
    return TensorDescriptor(x, [B * S, H * D], [x.stride(1), 1], [rows, D], SHARED_LAYOUT)


def launch_config(head_dim: int) -> dict[str, int]:
    """Slots of each ring. More of them were not faster (benchmarks/launch.py's shape, head dim 128: 2 or 3)."""
    return {"STAGES": 2 if head_dim == 128 else 4}


def hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    means: BlockCompensation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel. Shapes as in ``block_sparse_attention``, which validates them; see ``hopper_unsupported``.

    means: what stands for keys that the plan leaves out; in the output and in the log-sum-exp.
    """
    B, Sq, H, D = q.shape
    q, k, v = as_rows(q), as_rows(k), as_rows(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((B, H, Sq), dtype=torch.float32, device=q.device)
    per_set, q_blocks, longest = plan.sets, plan.index.shape[2], plan.index.shape[3]
    unused = plan.index  # a pointer that a specialised kernel never reads
    mean_k, mean_v, lists, bias = k, v, None, unused
    if means is not None:
        mean_k, mean_v = (as_rows(x.to(q.dtype)) for x in (means.key_mean, means.value_mean))
        lists = means.lists or every_block(means.key_mean.shape[1], q.device)
        bias = with_rows_in_line(means.bias)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        hopper_kernel[(q_blocks, B * H)](
            _descriptor(q, HALF.value), _descriptor(k, BLOCK), _descriptor(v, BLOCK), out, lse,
            out.stride(0), out.stride(1), out.stride(2),
            plan.q_start, plan.q_rows, plan.k_rows,
            plan.index, plan.key_start, plan.ends,
            unused if plan.head_set is None else plan.head_set,
            unused if plan.key_encoding is None else plan.key_encoding,
            unused if plan.row_encoding is None else plan.row_encoding,
            plan.guard_bits,
            0 if plan.index.shape[0] == 1 else per_set * q_blocks,
            q_blocks, longest, H, H // k.shape[2], Sq, k.shape[1], scale * LOG2E,
            _descriptor(mean_k, BLOCK), _descriptor(mean_v, BLOCK),
            unused if lists is None else lists.index, unused if lists is None else lists.ends, bias,
            *((0, 0) if lists is None else lists.strides), bias.stride(0), bias.stride(1),
            mean_k.shape[1], 0.0 if lists is None else lists.even_bias * LOG2E,
            D=D, BLOCK_N=BLOCK,
            SHARED_SET=per_set == 1, HAS_HEAD_SET=plan.head_set is not None, HAS_INTERVALS=plan.row_encoding is not None,
            HAS_MEANS=means is not None,
            num_warps=4, **launch_config(D),
        )  # fmt: skip
    return out, lse
