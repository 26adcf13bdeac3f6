"""Attention over a few keys, and how two parts of one softmax are put together.

λ[s] = log Σ_k exp(scale · q_s·k)                                 over the keys of a part
out  = (e^λ o + e^μ p) / (e^λ + e^μ)                              of parts (o, λ) and (p, μ), exact
"""

from __future__ import annotations

import torch

from tilewise.kernels.attention.dispatch import Choice, block_sparse_attention, choose_backend
from tilewise.kernels.device import capturing
from tilewise.kernels.errors import UnsupportedPlanError
from tilewise.kernels.plans.block_plan import BlockPlan, plan_of_all

SCORES = 1 << 24  # float32 numbers in a tensor that is made on the way: 64 MiB, some of which are held at once


def attend_few(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp: on a GPU by the kernel that runs the plans, else plain, some queries at a time.

    Args:
        query: (B, n, H, D). keys, values: (B, P, H, D), some hundreds; P = 0 gives 0 and −inf.
        scale: of the scores; None: 1 / √D.

    Returns:
        (B, n, H, D) in query's dtype and (B, H, n) float32, natural.
    """
    tokens, some = query.shape[1], keys.shape[1]
    if query.is_cuda and tokens and some:
        # Not kept if it is made while a CUDA graph is recorded, whose memory is the graph's.
        plan = (plan_of_all.__wrapped__ if capturing(query.device) else plan_of_all)(tokens, some, query.device)
        if (choice := _choice(query, keys, values, plan)) is not None:
            return block_sparse_attention(query, keys, values, plan, scale=scale, backend=choice, return_lse=True)
    # Scores in float32: in 16 bits they would be rounded before the softmax, and in float16 overflow.
    keys, values = keys.float().permute(0, 2, 3, 1), values.transpose(1, 2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    batch, _, heads, _ = query.shape
    rows = max(1, SCORES // max(1, batch * heads * max(keys.shape[2:])))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    for first in range(0, tokens, rows):
        part = slice(first, first + rows)
        scores = (query[:, part].float() * factor).transpose(1, 2) @ keys
        total = scores.logsumexp(-1)
        lse[:, :, part] = total
        weights = torch.exp(scores - total[..., None]).to(values.dtype)
        out[:, part] = (weights @ values).transpose(1, 2)
    return out, lse


def _choice(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: BlockPlan) -> Choice | None:
    """What runs the plan; None: nothing takes these tensors, and plain attention is as exact."""
    try:
        return choose_backend(query, keys, values, plan)
    except UnsupportedPlanError:
        return None


def merged(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, into: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one softmax as one: outputs (B, n, H, D) and log-sum-exps (B, H, n) float32. No query is without any key.

    into: what to write the output to, of out's shape and dtype; None: a tensor is made.
    """
    batch, tokens, heads, width = out.shape
    rows = max(1, SCORES // max(1, batch * heads * width))
    total = torch.logaddexp(lse, other_lse)
    both = torch.empty_like(out, memory_format=torch.contiguous_format) if into is None else into
    for first in range(0, tokens, rows):
        part = slice(first, first + rows)
        one, two = (torch.exp(x[:, :, part] - total[:, :, part]).transpose(1, 2)[..., None] for x in (lse, other_lse))
        both[:, part] = (one * out[:, part] + two * other[:, part]).to(out.dtype)
    return both, total
