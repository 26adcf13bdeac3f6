"""What a density costs each head of a call, measured on a sample of its queries.

For r queries s of P blocks, with the blocks that a density l keeps by a ranking k, and the means of the others:

    error[b, h, k, l] = Σ_s |(o[k, l, s] − o[s]) W[h]|²  ÷  Σ_h Σ_s |o[s] W[h]|²     o: exact, W[h]: rows of the output projection

A block's part of a query's numerator and denominator is computed once, and each choice adds up the parts of the blocks that it
keeps: all together cost about what exact attention of these queries costs. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Layout
from tilewise.kernels.selection.block_scores import variance_term
from tilewise.kernels.selection.select import select_rows
from tilewise.plugins.methods.dynamic.head_rankings import Ranking, rank
from tilewise.plugins.methods.dynamic.map_method import CallMaps
from tilewise.plugins.methods.head_part import HeadPart, some_heads

BLOCKS, QUERIES = 32, 4  # query blocks that are sampled, and queries of each
AT_ONCE = 128 * 2**20  # bytes of scores in float32 that are there at a time


def sampled_errors(
    maps: CallMaps,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    densities: Sequence[float],
    rankings: Sequence[Ranking],
    module: nn.Module | None = None,
    sample: tuple[int, int] = (BLOCKS, QUERIES),
    part: HeadPart | None = None,
) -> torch.Tensor:
    """(B, H, rankings, levels) float32: see the module's docstring; nan where queries, keys or values are not finite.

    Args:
        maps: of the call, with ``blocks`` and without a window.
        qkv: query (B, S, H, D), key and value (B, S, Hk, D), in the layout's order.
        densities: of rows of the map, rising; 1 is exact. rankings: by which the blocks are chosen.
        module: the attention layer, whose output projection weighs the errors; None, or one without a plain projection on the
            device: all channels count the same.
        sample: query blocks, and queries of each.
        part: which heads of the layer the call is over; None: all.
    """
    assert maps.blocks is not None
    query, key, value = qkv
    batch, heads = query.shape[0], query.shape[2]
    layout, rows, ratio = maps.candidates.layout, maps.candidates.rows, heads // key.shape[2]
    blocks, at = sampled_queries(layout, query.device, *sample)
    kept = _kept(maps, blocks, rows, densities, rankings)  # (choices, B, H, P, N)
    bias = rows.log() + variance_term(maps.blocks.s2[:, :, blocks], rows)  # (B, H, P, N)
    tokens, there = _tokens_of_blocks(layout, query.device)
    at_once = max(1, AT_ONCE // (4 * batch * at.numel() * there.numel() * ratio))  # key heads
    share = rows[blocks].float().repeat_interleave(at.shape[1])  # of the tokens that a query stands for
    errors, sizes = [], []
    for first in range(0, key.shape[2], at_once):
        shared = slice(first, first + at_once)
        own = slice(first * ratio, (first + at_once) * ratio)
        k, v = (x[:, tokens, shared].float().permute(0, 3, 1, 2, 4) for x in (key, value))  # (B, h, N, n, D)
        q = query[:, at, own].float().movedim(3, 1)  # (B, H', P, r, D)
        means = [x.mean[:, :, shared].transpose(1, 2) for x in (maps.blocks.keys, maps.blocks.values)]
        exact, sparse = _outputs(q, k, v, there, means, bias[:, own], kept[:, :, own], scale)
        gram = projection_gram(module, heads, own, query.device, part)
        errors.append(_size(sparse - exact[:, :, None], gram, share))
        sizes.append(_size(exact[:, :, None], gram, share))
    each = torch.cat(sizes, 1)
    size = (each if part is None else part.whole(each)).sum((1, 2))
    return (torch.cat(errors, 1) / size[:, None, None]).unflatten(2, (len(rankings), len(densities)))


def sampled_queries(
    layout: Layout, device: torch.device, blocks: int, queries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) int64 query blocks without text, spread evenly, and (P, queries) int64 tokens of them; kept with the layout."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        video = (~layout.is_text).nonzero().flatten()
        count = min(blocks, len(video))
        found = video[(torch.arange(count) * 2 + 1) * len(video) // (2 * count)]
        rows = layout.block_rows[found, None]
        at = layout.block_start[found, None] + (torch.arange(queries) * 2 + 1) * rows // (2 * queries)
        with torch.inference_mode(False):
            return found.to(device), at.to(device)

    return layout.cached(("sampled queries", blocks, queries, device), make)


def projection_gram(
    module: nn.Module | None,
    heads: int,
    which: slice = slice(None),
    device: torch.device | None = None,
    part: HeadPart | None = None,
) -> torch.Tensor | None:
    """(H', D, D) float32 on ``device``: W[h] W[h]ᵀ of some heads' rows of a layer's output projection; None where it has none of
    the usual form, packed weights, or weights that are not there (meta). device: None: the weights' own. part: which heads of the
    layer the ``heads`` are; None: all."""
    out = getattr(module, "to_out", None)
    first = out[0] if isinstance(out, nn.ModuleList | nn.Sequential) and len(out) else out
    weight: Any = getattr(first, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()
    if not plain or weight.device.type == "meta" or weight.shape[1] % (total := heads if part is None else part.total):
        return None
    rows = weight.detach().t().unflatten(0, (total, -1))
    rows = (rows if part is None else some_heads(rows, part.own, 0))[which].to(device or weight.device).float()
    return rows @ rows.transpose(1, 2)


def _kept(
    maps: CallMaps,
    blocks: torch.Tensor,
    rows: torch.Tensor,
    densities: Sequence[float],
    rankings: Sequence[Ranking],
) -> torch.Tensor:
    """(rankings · levels, B, H, P, N) float32, 1 where a sampled query block keeps a key block."""
    always, found = maps.always[blocks], []
    for ranking in rankings:
        ranks = rank(maps.candidates, ranking, blocks).contiguous()
        # A density for each head, as it is in the call: then 1 is everything.
        heads = [ranks.new_full(ranks.shape[1:2], density) for density in densities]
        found += [select_rows(ranks, always, rows, density=each) for each in heads]
    return torch.stack(found).float()


def _tokens_of_blocks(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, n) int64 tokens of each block, n those of the largest, and (N, n) bool, which there are; kept with the layout."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.arange(int(layout.block_rows.max()))
        there = place < layout.block_rows[:, None]
        tokens = torch.where(there, layout.block_start[:, None] + place, layout.block_start[:, None])
        with torch.inference_mode(False):
            return tokens.to(device), there.to(device)

    return layout.cached(("tokens of blocks", device), make)


def _outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    there: torch.Tensor,
    means: list[torch.Tensor],
    bias: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of sampled queries: exact (B, H, P·r, D), and of each choice (B, H, choices, P·r, D).

    query: (B, H, P, r, D). key, value: (B, Hk, N, n, D), by block. there: (N, n). means: (B, Hk, N, D) of key and value. bias:
    (B, H, P, N) of the means. kept: (choices, B, H, P, N).
    """
    B, H, P, r, D = query.shape
    ratio, (N, n) = H // key.shape[1], there.shape
    each = query.reshape(B, -1, ratio * P * r, D)  # queries of the heads that share keys
    scores = (scale * each @ key.flatten(2, 3).transpose(2, 3)).unflatten(-1, (N, n)).masked_fill(~there, -torch.inf)
    far = (scale * each @ means[0].transpose(2, 3)).reshape(B, H, P, r, N) + bias[:, :, :, None]
    most = torch.maximum(scores.amax((-2, -1)), far.reshape(B, -1, ratio * P * r, N).amax(-1))  # (B, Hk, ratio·P·r)
    weight = (scores - most[..., None, None]).exp_()
    mass = weight.sum(-1).reshape(B, H, P, r, N)
    part = weight.transpose(2, 3) @ value  # (B, Hk, N, ratio·P·r, D): what each block adds
    part = part.unflatten(3, (ratio, P, r)).permute(0, 1, 3, 4, 2, 5, 6).reshape(B, H, P, N, r, D)
    far = (far - most.reshape(B, H, P, r, 1)).exp_()
    kept = kept.permute(1, 2, 3, 0, 4)  # (B, H, P, choices, N)
    far = far[:, :, :, None] * (1 - kept)[..., None, :]  # (B, H, P, choices, r, N): of the blocks that are not kept
    mean = means[1].repeat_interleave(ratio, 1)[:, :, None, None]
    above = (kept @ part.flatten(4)).unflatten(-1, (r, D)) + far @ mean
    below = kept @ mass.transpose(3, 4) + far.sum(-1)  # (B, H, P, choices, r)
    exact = part.sum(3) / mass.sum(-1, keepdim=True)
    sparse = above / below[..., None]
    return exact.flatten(2, 3), sparse.transpose(2, 3).flatten(3, 4)


def _size(x: torch.Tensor, gram: torch.Tensor | None, share: torch.Tensor) -> torch.Tensor:
    """(B, H, choices): Σ share · |x W|² of (B, H, choices, queries, D)."""
    return (x * (x if gram is None else x @ gram[:, None])).sum(-1) @ share
