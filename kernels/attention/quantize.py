"""Queries, keys and values in 8 bits, block by block of a plan: what the kernel of hopper_8bit.py multiplies.

    q   int8   q ≈ c · q̂                      c one number a row:    max |q| / 127
    k   int8   k ≈ μ + s · k̂                  s one number a block:  max |k − μ| / 127
    v   8 bit  v ≈ ν + σ · u · v̂              u one number a block:  max |v − ν|/σ, over 127 or 448

μ and ν are means over the tokens, σ the spread (standard deviation) over them, one number a channel each. Subtracting the
keys' mean changes no softmax (SageAttention, arXiv 2410.02367, §4.2); ν and σ come back after the sum, whose weights add to 1.
Both are exact for any μ, ν and σ, so a sample of the tokens is enough for them.

Each block is stored with room for ``plan.block`` rows, missing ones 0. Values are stored transposed, and their keys in
``key_order``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tilewise.kernels.device import runs_triton
from tilewise.kernels.plans.block_plan import BlockPlan

Precision = Literal["int8", "fp8"]
VALUES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # type and largest magnitude
SAMPLE = 2048  # tokens that means and spreads are taken from


@dataclass(frozen=True)
class Quantized:
    """8-bit operands and what turns them back. R is ``plan.block``; Nq, Nk the plan's query and key blocks.

    Attributes:
        q: (B, H, Nq, R, D) int8.
        q_facts: (B, H, Nq, 2, R) float32: the row's scale c, and scale · q·μ, which the log-sum-exp lacks.
        k: (B, Hk, Nk, R, D) int8. Where means stand for keys, their blocks of R follow: Nk + L of them, here and below.
        v: (B, Hk, Nk, D, R) int8 or float8_e4m3fn, keys in ``key_order``.
        kv_scales: (B, Hk, Nk, 2) float32: the block's scales s and u.
        v_facts: (B, Hk, 2, D) float32: σ and ν.
    """

    q: torch.Tensor
    q_facts: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_scales: torch.Tensor
    v_facts: torch.Tensor


def key_order(rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(rows,) which key each column of a transposed block of values holds.

    In a wgmma accumulator, thread t of four has columns 2t and 2t + 1 of each group of 8; as an 8-bit operand it must hold
    4t … 4t + 3 of each 16. So within each 16 the columns 4t … 4t + 3 take keys 2t, 2t + 1, 8 + 2t and 9 + 2t.
    """
    at = torch.arange(rows, device=device)
    return at // 16 * 16 + at // 2 % 2 * 8 + at // 4 % 4 * 2 + at % 2


def sample_statistics(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the keys (B, Hk, D), and spreads and means of the values (B, Hk, 2, D), from evenly spaced tokens; float32."""
    step = max(1, k.shape[1] // SAMPLE)
    keys, values = k[:, ::step].float(), v[:, ::step].float()
    spread, mean = torch.std_mean(values, dim=1, correction=0)
    # A channel that hardly varies in the sample may do so elsewhere, and a block has one scale for all of them.
    least = spread.amax(-1, keepdim=True) / 64
    spread = torch.maximum(spread, torch.where(least > 0, least, torch.ones_like(least)))
    return keys.mean(1), torch.stack([spread, mean], dim=2)


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Quantized:
    """Shapes as in ``block_sparse_attention``, 16 ≤ D a power of two.

    scale: of the scores. means: (B, N, Hk, D) of keys and of values each, which stand for keys that the plan leaves out.
    """
    k_mean, v_facts = sample_statistics(k, v)
    if runs_triton(q.device):
        from tilewise.kernels.attention.triton_quantize import triton_quantize

        return triton_quantize(q, k, v, plan, scale, precision, k_mean, v_facts, means)
    return quantize_naive(q, k, v, plan, scale, precision, k_mean, v_facts, means)


def blocks_of_means(means: int, room: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) int32 each: the first mean of each block of ``room``, and how many it has."""
    start = torch.arange(0, means, room, dtype=torch.int32, device=device)
    return start, (means - start).clamp(max=room)


def quantize_naive(
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
    """The formulas above, as they are written."""
    R = plan.block
    group = q.shape[2] // k.shape[2]
    queries = _blocks(q, plan.q_start, plan.q_rows, R)
    shift = scale * (queries * k_mean.repeat_interleave(group, 1)[:, :, None, None]).sum(-1)
    q8, q_scale = _to_8bit(queries, (-1,), torch.int8, 127.0)
    keys = _blocks(k - k_mean[:, None], plan.k_start, plan.k_rows, R)
    if means is not None:
        of_means = blocks_of_means(means[0].shape[1], R, k.device)
        keys = torch.cat([keys, _blocks(means[0] - k_mean[:, None], *of_means, R)], 2)
    k8, k_scale = _to_8bit(keys, (-1, -2), torch.int8, 127.0)
    spread, mean = v_facts[:, None].unbind(3)
    values = _blocks((v - mean) / spread, plan.k_start, plan.k_rows, R)
    if means is not None:
        values = torch.cat([values, _blocks((means[1] - mean) / spread, *of_means, R)], 2)
    v8, v_scale = _to_8bit(values[..., key_order(R, v.device), :].transpose(-1, -2), (-1, -2), *VALUES[precision])
    return Quantized(
        q=q8,
        q_facts=torch.stack([q_scale[..., 0], shift], dim=3),
        k=k8,
        v=v8.contiguous(),
        kv_scales=torch.stack([k_scale[..., 0, 0], v_scale[..., 0, 0]], dim=-1),
        v_facts=v_facts,
    )


def _blocks(x: torch.Tensor, start: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
    """(B, H, N, room, D) float32 from (B, S, H, D): each block's rows, then zeros."""
    row = torch.arange(room, device=x.device)
    at = (start[:, None] + row).clamp(max=x.shape[1] - 1).long()
    inside = (row < rows[:, None])[None, :, :, None, None]
    return torch.where(inside, x[:, at].float(), 0.0).permute(0, 3, 1, 2, 4)


def _to_8bit(
    x: torch.Tensor, axes: tuple[int, ...], dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x ≈ scale · y: y in ``dtype``, and a scale for each slice along ``axes`` (1 where all is 0)."""
    peak = x.abs().amax(axes, keepdim=True)
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    y = x / scale
    return (torch.round(y) if dtype == torch.int8 else y.clamp(-largest, largest)).to(dtype), scale
