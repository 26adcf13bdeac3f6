"""Three coordinates in one integer, so that a kernel tests a whole interval with two subtractions.

Each axis of length L gets a field of bits enough for L − 1, and a guard bit above it:

    encoding = Σ coordinate_a << shift_a            guard = Σ 1 << (shift_a + bits_a)
    lo ≤ x on every axis     ⇔  ((x | guard) − lo) & guard = guard
    x ≤ hi on every axis     ⇔  ((hi | guard) − x) & guard = guard

because a field whose difference is negative borrows from its own guard bit and from nowhere else: subtraction of several small
numbers within one register (SWAR; Lamport, "Multiple byte processing with full-word instructions", CACM 18(8), 1975). An
interval that holds nothing is written as lo = the field's largest value, hi = 0. A key that nobody sees (a row that a block
lacks) has the encoding ``guard``: hi | guard less that has no guard bit left.
"""

from __future__ import annotations

import torch


def encoding_fields(shape: tuple[int, int, int]) -> tuple[list[int], int]:
    """(shift of each axis, guard bits as a signed 32-bit integer).

    Raises:
        ValueError: three fields do not fit in 32 bits.
    """
    shifts, guard_bits, at = [], 0, 0
    for length in reversed(shape):
        bits = max(1, (length - 1).bit_length())
        shifts.append(at)
        guard_bits |= 1 << (at + bits)
        at += bits + 1
    if at > 32:
        raise ValueError(
            f"a grid of {shape} positions needs {at} bits for an interval test, there are 32; use smaller grids"
        )
    return shifts[::-1], guard_bits - (1 << 32) if guard_bits >= 1 << 31 else guard_bits


def encode_coords(coords: torch.Tensor, shifts: list[int]) -> torch.Tensor:
    """(…) int32 encodings of (3, …) coordinates; negative ones (text tokens, which no kernel tests) count as 0."""
    total = sum(coords[axis].clamp(min=0).long() << shift for axis, shift in enumerate(shifts))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def encode_intervals(intervals: torch.Tensor, shifts: list[int], guard_bits: int) -> torch.Tensor:
    """(G, 2, S) int32 from (G, 6, S) intervals (lo, hi exclusive, per axis): lo, and hi − 1 with its guard bits set."""
    ends = [shifts[a - 1] if a else (guard_bits & 0xFFFFFFFF).bit_length() for a in range(3)]
    room = torch.tensor([(1 << (end - shift - 1)) - 1 for end, shift in zip(ends, shifts, strict=True)])
    largest = room.to(intervals.device).view(3, 1, 1)
    lo, hi = intervals[:, 0::2].transpose(0, 1).long(), intervals[:, 1::2].transpose(0, 1).long()
    nothing = (hi <= lo) | (lo > largest) | (hi <= 0)
    lo = torch.where(nothing, largest, lo.clamp(min=0))
    last = torch.where(nothing, 0, (hi - 1).clamp(max=largest))
    return torch.stack([encode_coords(lo, shifts), encode_coords(last, shifts) | guard_bits], dim=1)


def inside(key_encoding: torch.Tensor, row_encoding: torch.Tensor, guard_bits: int) -> torch.Tensor:
    """(…, rows, keys) bool: the test that kernels make. ``key_encoding`` (…, keys), ``row_encoding`` (…, 2, rows)."""
    at = key_encoding[..., None, :]
    lo, last = row_encoding[..., None].unbind(-3)
    return (((at | guard_bits) - lo) & (last - at) & guard_bits) == guard_bits
