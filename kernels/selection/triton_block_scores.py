"""Triton kernels of kernels/selection/block_scores.py, which has the formulas: a program goes over one row of a map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewise.kernels.selection.block_scores import LEAST_S2, LEAST_SPREAD


@triton.jit
def term(s2, log_n):
    """In any units of both: it is homogeneous in them. What is not a number stays so."""
    return tl.where(s2 <= 2 * log_n, 0.5 * s2, tl.sqrt(2 * s2 * log_n) - log_n)


@triton.jit
def block_logits_kernel(dot_ptr, s2_ptr, rows_ptr, out_ptr, N, scale, CHUNK: tl.constexpr):
    """Grid: (B·H·Nq,). N: key blocks. s2_ptr: None without the term."""
    row = tl.program_id(0).to(tl.int64) * N
    for begin in range(0, N, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        there = j < N
        log_n = tl.log(tl.load(rows_ptr + j, mask=there, other=1).to(tl.float32))
        x = tl.load(dot_ptr + row + j, mask=there) * scale + log_n
        if s2_ptr is not None:
            x += term(tl.load(s2_ptr + row + j, mask=there), log_n)
        tl.store(out_ptr + row + j, x, mask=there)


@triton.jit
def error_logits_kernel(logits_ptr, s2_ptr, spread_ptr, out_ptr, M, N, H, group, least_s2, least, CHUNK: tl.constexpr):
    """Grid: (B·H·M,). M, N: query and key blocks. spread: (B, H / group, N)."""
    row = tl.program_id(0).to(tl.int64) * N
    head = tl.program_id(0) // M
    spread_at = spread_ptr + ((head // H) * (H // group) + head % H // group).to(tl.int64) * N
    for begin in range(0, N, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        there = j < N
        s2 = tl.load(s2_ptr + row + j, mask=there, other=1.0)
        s2 = tl.where(s2 < least_s2, least_s2, s2)
        # 1 − e^{−s²} by its series where s² is small: the difference would keep few digits.
        gone = tl.where(s2 < 1e-2, s2 * (1 - s2 * (0.5 - s2 / 6)), 1 - tl.exp(-s2))
        spread = tl.load(spread_at + j, mask=there, other=1.0)
        spread = tl.where(spread < least, least, spread)
        x = tl.load(logits_ptr + row + j, mask=there) + 0.5 * (s2 + tl.log(gone)) + 0.5 * tl.log(spread)
        tl.store(out_ptr + row + j, x, mask=there)


@triton.jit
def summary_bias_kernel(s2_ptr, rows_ptr, seen_ptr, out_ptr, N, CHUNK: tl.constexpr):
    """Grid: (B·H·Nq,). N: key blocks."""
    row = tl.program_id(0).to(tl.int64) * N
    for begin in range(0, N, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        there = j < N
        log_n = tl.log(tl.load(rows_ptr + j, mask=there, other=1).to(tl.float32))
        x = log_n + term(tl.load(s2_ptr + row + j, mask=there), log_n)
        seen = tl.load(seen_ptr + row + j, mask=there, other=1) != 0
        tl.store(out_ptr + row + j, tl.where(seen, float("-inf"), x), mask=there)


def _shape(x: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Rows of a map, and how a row is cut."""
    chunk = min(1024, max(16, triton.next_power_of_2(x.shape[-1])))
    return x.shape[:3].numel(), {"CHUNK": chunk, "num_warps": 4}


def triton_block_logits(dot: torch.Tensor, s2: torch.Tensor | None, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """As ``block_logits``."""
    out = torch.empty_like(dot, memory_format=torch.contiguous_format)
    count, options = _shape(dot)
    if count:
        s2 = None if s2 is None else s2.contiguous()
        with torch.cuda.device_of(dot):
            block_logits_kernel[(count,)](dot.contiguous(), s2, rows, out, len(rows), scale, **options)
    return out


def triton_error_logits(logits: torch.Tensor, s2: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """As ``error_logits``."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    count, options = _shape(logits)
    H = logits.shape[1]
    if count:
        with torch.cuda.device_of(logits):
            error_logits_kernel[(count,)](
                logits.contiguous(), s2.contiguous(), spread.contiguous(), out, logits.shape[2], logits.shape[3], H,
                H // spread.shape[1], LEAST_S2, LEAST_SPREAD, **options,
            )  # fmt: skip
    return out


def triton_summary_bias(s2: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """As ``summary_bias``."""
    out = torch.empty_like(s2, memory_format=torch.contiguous_format)
    count, options = _shape(s2)
    if count:
        seen = seen.contiguous().view(torch.uint8)
        with torch.cuda.device_of(s2):
            summary_bias_kernel[(count,)](s2.contiguous(), rows, seen, out, len(rows), **options)
    return out
