"""Triton kernel of ``select_rows``: a program holds one row, and finds by bisection the logit below which enough is kept.

    enough(τ) = (Σ {w[j] : logit[j] ≥ τ} ≥ target  and  count ≥ floor)  or  count ≥ cap

falls from true to false as τ rises, so no row has to be sorted. What is left between the two ends of the bisection, equal
logits above all, is taken in order of its number until it is enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.selection.select import GOLDEN

ROUNDS = 26  # of bisection: the width of a row's logits, 2⁻²⁶ of it


@triton.jit
def select_rows_kernel(
    logits_ptr, always_ptr, rows_ptr, kept_ptr, N, tokens_ptr, target, lists, floor, cap, golden,
    BY_MASS: tl.constexpr, BY_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, B·H). N: key blocks. target: a number; BY_HEAD: points to ``lists`` densities, (H,)
    or (B·H,)."""
    i = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i
    j = tl.arange(0, BLOCK_N)
    there = j < N
    x = tl.load(logits_ptr + row * N + j, mask=there, other=float("-inf"))
    always = (tl.load(always_ptr + i * N + j, mask=there, other=0) != 0) & there
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    x = tl.where(broken != 0, 0.0, x)
    candidate = (x > float("-inf")) & there
    high = tl.max(tl.where(candidate, x, float("-inf")), 0)
    if BY_HEAD:
        wanted = tl.load(target + tl.program_id(1) % lists)
        wanted = tl.where(wanted < 1.0, wanted, 2.0)  # never enough: everything is kept
    else:
        wanted = target
    if BY_MASS:
        w = tl.where(candidate, tl.exp(x - high), 0.0)
        w = w / tl.maximum(tl.sum(w, 0), 1e-30)
        aim = wanted
    else:
        w = tl.load(rows_ptr + j, mask=there, other=0).to(tl.float32) / tl.load(tokens_ptr)
        u = i.to(tl.float32) * golden
        aim = wanted - (u - tl.floor(u)) / N
    given = tl.sum(tl.where(always, w, 0.0), 0)
    given_count = tl.sum(always.to(tl.int32), 0)
    free = candidate & (always == 0)
    w = tl.where(free, w, 0.0)
    low = tl.min(tl.where(free, x, float("inf")), 0)
    high = tl.max(tl.where(free, x, float("-inf")), 0)
    low = tl.where(low == float("inf"), 0.0, low)
    high = tl.where(high == float("-inf"), 0.0, high)
    # Above ``high`` nothing is taken; all at or above ``low``, which is everything at first.
    high = high + tl.maximum(tl.abs(high) * 1e-6, 1e-30)
    for _ in range(ROUNDS):
        middle = 0.5 * (low + high)
        taken = free & (x >= middle)
        mass = given + tl.sum(tl.where(taken, w, 0.0), 0)
        count = given_count + tl.sum(taken.to(tl.int32), 0)
        enough = ((mass >= aim) & (count >= floor)) | (count >= cap)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    sure = free & (x >= high)
    left = free & (x >= low) & (x < high)
    mass = given + tl.sum(tl.where(sure, w, 0.0), 0)
    count = given_count + tl.sum(sure.to(tl.int32), 0)
    w = tl.where(left, w, 0.0)
    number = left.to(tl.int32)
    before = mass + tl.cumsum(w, 0) - w
    count = count + tl.cumsum(number, 0) - number
    enough = ((before >= aim) & (count >= floor)) | (count >= cap)
    kept = always | sure | (left & (enough == 0))
    none = tl.max(kept.to(tl.int32), 0) == 0
    kept = kept | (broken != 0) | none
    tl.store(kept_ptr + row * N + j, kept.to(tl.uint8), mask=there)


def triton_select_rows(
    logits: torch.Tensor,
    always: torch.Tensor,
    rows: torch.Tensor,
    target: float | torch.Tensor,
    by_mass: bool,
    floor: int,
    cap: int,
) -> torch.Tensor:
    """As ``select_rows_reference``; logits must be contiguous."""
    by_head, lists = False, 1
    if isinstance(target, torch.Tensor):
        by_head, lists, target = True, target.numel(), target.contiguous()
    B, H, M, N = logits.shape
    kept = torch.empty((B, H, M, N), dtype=torch.uint8, device=logits.device)
    block = max(16, triton.next_power_of_2(N))
    # The sum of all rows, which are a grid's tokens, without waiting for it: the mean of w is 1/N either way.
    tokens = rows.sum().to(torch.float32)
    if kept.numel():
        with torch.cuda.device_of(logits):
            select_rows_kernel[(M, B * H)](
                logits, always.contiguous().view(torch.uint8), rows, kept, N, tokens, target, lists, floor, cap, GOLDEN,
                BY_MASS=by_mass, BY_HEAD=by_head, BLOCK_N=block, ROUNDS=ROUNDS, num_warps=warps_of(block),
            )  # fmt: skip
    return kept.view(torch.bool)


def warps_of(block: int) -> int:
    """16 numbers of a row a thread: several copies of them are alive at once."""
    return max(4, min(16, block // 512))
