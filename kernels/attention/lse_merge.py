"""Attention in parts: each part with its log-sum-exp (LSE), and two parts of one softmax merged exactly.

    lse[s] = log Σ_k exp(scale · q_s·k)                                         over the keys of a part
    out    = (e^lse₁ · out₁ + e^lse₂ · out₂) / (e^lse₁ + e^lse₂)                of two parts over disjoint keys
    lse    = log(e^lse₁ + e^lse₂)

as FlashAttention merges blocks of keys (arXiv 2205.14135, §3.1) and ring attention parts of a sequence (arXiv 2310.01889).
"""

from __future__ import annotations

import torch

from tilewise.kernels.attention.dispatch import Choice, block_sparse_attention, choose_backend
from tilewise.kernels.device import capturing
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan, dense_plan_of_lengths
from tilewise.kernels.plans.layout import Layout

MAX_SCORES = 1 << 24  # float32 numbers in an intermediate tensor: 64 MiB, some of which are held at once


def attend_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    *,
    keep_with: Layout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention over a few keys, and its log-sum-exp.

    On a GPU by the kernel that runs the plans, where one takes the tensors; otherwise plain attention, some queries at a time.

    Args:
        query: (B, n, H, D).
        key, value: (B, P, Hk, D), some hundreds of keys, Hk dividing H. P = 0 gives an output of 0 and a log-sum-exp of −inf.
        scale: of the scores; None: 1/√D.
        keep_with: where the kernel's plan is kept from one call to the next; None: it is made at each call.

    Returns:
        The output (B, n, H, D) in query's dtype, and the natural log-sum-exp (B, H, n) float32.
    """
    queries, keys = query.shape[1], key.shape[1]
    if query.is_cuda and queries and keys:
        plan = _plan(queries, keys, query.device, keep_with)
        if (choice := _choice(query, key, value, plan)) is not None:
            return block_sparse_attention(query, key, value, plan, scale=scale, backend=choice, return_lse=True)
    batch, _, heads, _ = query.shape
    group = heads // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) if group > 1 else x for x in (key, value))
    # Scores in float32: in 16 bits they would be rounded before the softmax, and in float16 overflow.
    key, value = key.float().permute(0, 2, 3, 1), value.transpose(1, 2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows = max(1, MAX_SCORES // max(1, batch * heads * max(key.shape[2:])))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        scores = (query[:, part].float() * factor).transpose(1, 2) @ key
        total = scores.logsumexp(-1)
        lse[:, :, part] = total
        weights = torch.exp(scores - total[..., None]).to(value.dtype)
        out[:, part] = (weights @ value).transpose(1, 2)
    return out, lse


def _plan(queries: int, keys: int, device: torch.device, keep_with: Layout | None) -> BlockPlan:
    # Not kept if it is made while a CUDA graph is recorded, whose memory is the graph's.
    if keep_with is None or capturing(device):
        return dense_plan_of_lengths(queries, keys, device)
    key = ("dense", queries, keys, device)
    return keep_with.cached(key, lambda: dense_plan_of_lengths(queries, keys, device))


def _choice(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan) -> Choice | None:
    """What runs the plan; None: no backend takes these tensors, and plain attention is as exact."""
    try:
        return choose_backend(query, key, value, plan)
    except UnsupportedPlanError:
        return None


def merge_attention(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, into: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys, merged into attention over both.

    Args:
        out, other: (B, n, H, D), the outputs of the two parts, of one dtype.
        lse, other_lse: (B, H, n) float32, their natural log-sum-exps. A query without any key has −inf in both, and output 0.
        into: what the output is written to, of out's shape and dtype; None: a new tensor.

    Returns:
        The merged output (B, n, H, D) and log-sum-exp (B, H, n).
    """
    batch, tokens, heads, width = out.shape
    rows = max(1, MAX_SCORES // max(1, batch * heads * width))
    total = torch.logaddexp(lse, other_lse)
    base = total.masked_fill(total == -torch.inf, 0)  # −inf − −inf would be NaN
    both = torch.empty_like(out, memory_format=torch.contiguous_format) if into is None else into
    for first in range(0, tokens, rows):
        part = slice(first, first + rows)
        one, two = (torch.exp(x[:, :, part] - base[:, :, part]).transpose(1, 2)[..., None] for x in (lse, other_lse))
        both[:, part] = (one * out[:, part] + two * other[:, part]).to(out.dtype)
    return both, total
