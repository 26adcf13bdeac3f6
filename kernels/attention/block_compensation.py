"""Block-mean compensation: one summary row for each skipped key block stands for its tokens in the same softmax.

For query s of block i, with out and lse over the keys that it did see, key block j gets the logit

    z[s, j] = scale · q[s] · key_mean[j] + bias[i, j]             bias −inf where the block was seen

and the value value_mean[j].  With  m = logaddexp(lse[s], logsumexp over j of z[s, j])  the two merge exactly:

    out'[s] = exp(lse[s] − m) · out[s] + Σ over j of exp(z[s, j] − m) · value_mean[j]

A block of n tokens with keys k has  log Σ exp(scale · q·k) ≈ scale · q·k̄ + log n + ½ · scale² · q² · var(k)  (the second
cumulant; exact for Gaussian keys): bias = log n + the variance term. It costs N summary rows for S tokens: under 1 % of dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.kernels.device import FLOATS, runs_triton
from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.plans.mean_lists import MeanLists


@dataclass(frozen=True)
class BlockCompensation:
    """Means that stand for the keys which a plan skips.

    key_mean, value_mean: (B, N, Hk, D), float32 or the dtype of the call. bias: (B, H, Nq, N) float32, −inf where the keys of a
    mean are seen. lists: of the blocks of means with a bias above −inf, by sets of heads as the plan's; None: not known.
    """

    key_mean: torch.Tensor
    value_mean: torch.Tensor
    bias: torch.Tensor
    lists: MeanLists | None = None


def add_block_compensation(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    bias: torch.Tensor,
    layout: Layout,
    scale: float,
) -> torch.Tensor:
    """Merge the summary rows of skipped key blocks into an attention output.

    Args:
        q: (B, S, H, D) float16, bfloat16 or float32, contiguous D ≤ 256; any other strides.
        out: (B, S, H, D) of q's dtype: what ``block_sparse_attention(..., return_lse=True)`` gave.
        lse: (B, H, S) float32, natural, from there as well.
        key_mean, value_mean: (B, Nk, Hk, D) float32, Hk dividing H: see ``block_stats``.
        bias: (B, H, Nq, Nk) float32 for query block i and key block j; −inf where j was seen. May be expanded over B and H.
        layout: of the queries. The keys' blocks may be another layout's, or cells.
        scale: of the attention call.

    Returns:
        The merged output, (B, S, H, D) contiguous, in out's dtype.

    Raises:
        ValueError: shapes that do not fit, with all of them.
        TypeError: another dtype.
    """
    B, S, H, D = q.shape
    N = key_mean.shape[1] if key_mean.ndim == 4 else 0
    Hk = key_mean.shape[2] if key_mean.ndim == 4 else 0
    fits = (
        layout.grid.tokens == S
        and out.shape == q.shape
        and lse.shape == (B, H, S)
        and bias.shape == (B, H, layout.blocks, N)
    )
    if not fits or key_mean.shape != (B, N, Hk, D) or value_mean.shape != key_mean.shape or not Hk or H % Hk or D > 256:
        raise ValueError(
            f"add_block_compensation: q {tuple(q.shape)}, out {tuple(out.shape)}, lse {tuple(lse.shape)}, key_mean "
            f"{tuple(key_mean.shape)}, value_mean {tuple(value_mean.shape)} and bias {tuple(bias.shape)} do not fit each other "
            f"and the {layout.blocks} query blocks of {layout.grid.tokens} tokens"
        )
    if q.dtype not in FLOATS or out.dtype != q.dtype or q.stride(3) != 1:
        raise TypeError(
            "add_block_compensation: q and out must be of one dtype of float16, bfloat16 and float32, q with a contiguous last "
            f"axis; got {q.dtype} and {out.dtype}, strides {q.stride()}"
        )
    if runs_triton(q.device):
        from tilewise.kernels.attention.triton_block_compensation import triton_add_block_compensation

        start, rows, _ = layout.block_table(q.device)
        return triton_add_block_compensation(q, out, lse, key_mean, value_mean, bias, start, rows, scale)
    rows = layout.block_rows
    if bool((rows == rows[0]).all()):
        return _merged_in_place(q, out, lse, key_mean, value_mean, bias, int(rows[0]), scale)
    return add_block_compensation_reference(q, out, lse, key_mean, value_mean, bias, layout, scale)


def _merged_in_place(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    bias: torch.Tensor,
    rows: int,
    scale: float,
) -> torch.Tensor:
    """The formula for blocks of equally many ``rows``: one (B, H, S, N) tensor, in which all steps are done; twice as fast as
    the naive way on a CPU."""
    (B, S, H, _), work = q.shape, key_mean.dtype
    groups = H // key_mean.shape[2]
    keys, values = (x.repeat_interleave(groups, 2) if groups > 1 else x for x in (key_mean, value_mean))
    z = (q.transpose(1, 2).to(work) * scale) @ keys.permute(0, 2, 3, 1)
    z = z.view(B, H, S // rows, rows, -1).add_(bias.to(work)[:, :, :, None]).view(B, H, S, -1)
    lse = lse.to(work)
    top = torch.maximum(z.amax(-1), lse).clamp_min(torch.finfo(work).min)  # where nothing was seen and nothing skipped
    weights = z.sub_(top[..., None]).exp_()
    seen = (lse - top).exp_()
    total = weights.sum(-1).add_(seen)
    merged = (weights @ values.transpose(1, 2)).addcmul_(out.transpose(1, 2).to(work), seen[..., None])
    return merged.div_(total.clamp_min_(1e-30)[..., None]).transpose(1, 2).to(out.dtype).contiguous()


def add_block_compensation_reference(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    bias: torch.Tensor,
    layout: Layout,
    scale: float,
) -> torch.Tensor:
    """The naive formula, in float32 or in the means' float64; (B, H, S, N) logits are made."""
    work = key_mean.dtype
    _, rows, _ = layout.block_table(q.device)
    of_block = torch.repeat_interleave(rows, output_size=q.shape[1])
    groups = q.shape[2] // key_mean.shape[2]
    keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (key_mean, value_mean))
    z = scale * (q.transpose(1, 2).to(work) @ keys.transpose(2, 3)) + bias.to(work)[:, :, of_block]
    lse = lse.to(work)
    m = torch.logaddexp(lse, z.logsumexp(-1))
    m = m.clamp_min(torch.finfo(work).min)  # where nothing was seen and nothing skipped
    merged = (lse - m).exp()[..., None] * out.transpose(1, 2).to(work) + (z - m[..., None]).exp() @ values
    return merged.transpose(1, 2).to(out.dtype).contiguous()
