"""Attention over keys and values averaged within small patches of a frame: a coarse view of everything, for less.

    k̄_p = mean of k over patch p,  v̄_p likewise,  n_p tokens in it
    out  = softmax(q k̄ᵀ · scale + log n) v̄

Were the keys of a patch all equal, this would be exact attention (a patch then weighs as much as its n tokens). Text tokens in
the sequence are patches of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from tilewise.kernels.plans.layout import Grid


@dataclass(frozen=True)
class Patches:
    """Which patch each token of a sequence belongs to.

    of_token: (S,) int64. count: (P,) tokens of each patch. Where all patches are equally large, members (P, n): the tokens
    of each; elsewhere bias (P,) float32: log of their sizes.
    """

    of_token: torch.Tensor
    count: torch.Tensor
    members: torch.Tensor | None
    bias: torch.Tensor | None


def pooling_of(grid: Grid, size: tuple[int, int], device: torch.device) -> Patches:
    """Patches of ``size`` (h, w) tokens in every frame; smaller ones at the borders of grids that they do not divide."""
    t, h, w = (torch.arange(n) for n in grid.shape)
    rows, columns = -(-grid.h // size[0]), -(-grid.w // size[1])
    patch = (t[:, None, None] * rows + (h // size[0])[:, None]) * columns + w // size[1]
    video = patch.reshape(-1)
    text = torch.arange(grid.text)
    if grid.text_first:
        of_token = torch.cat([text, video + grid.text])
    else:
        of_token = torch.cat([video, text + grid.t * rows * columns])
    count = torch.bincount(of_token)
    members = bias = None
    if bool((count == count[0]).all()):
        members = of_token.argsort(stable=True).view(len(count), -1).to(device)
    else:
        bias = count.float().log().to(device)
    return Patches(of_token.to(device), count.to(device), members, bias)


def pooled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, patches: Patches, scale: float | None = None
) -> torch.Tensor:
    """(B, S, H, D) queries over patches of keys and values, (B, S, H, D) as well."""
    key, value = _means(key, patches), _means(value, patches)
    bias = None if patches.bias is None else patches.bias.to(query.dtype).expand(1, 1, query.shape[1], -1)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, bias, scale=scale).transpose(1, 2)


def _means(x: torch.Tensor, patches: Patches) -> torch.Tensor:
    """(B, P, H, D): the mean over each patch, summed in float32."""
    if patches.members is not None:
        members = x.index_select(1, patches.members.flatten()).unflatten(1, tuple(patches.members.shape))
        return members.mean(2)
    # A head at a time, so as not to hold all of x in float32.
    shape = (x.shape[0], len(patches.count), x.shape[3])
    out = x.new_empty(x.shape[0], len(patches.count), *x.shape[2:])
    for head in range(x.shape[2]):
        total = torch.zeros(shape, dtype=torch.float32, device=x.device)
        total.index_add_(1, patches.of_token, x[:, :, head].float())
        out[:, :, head] = total / patches.count[:, None]
    return out
