"""Reference for the KV cache: Wan's self-attention with a Python list of un-rotated keys, rotated at every read, in float64.

Nothing here is shared with ``plugins/streaming``: frames are dictionaries, positions are given, tables come from the formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def tables(positions: list[int], height: int, width: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each (tokens, head_dim/2) float64, for frames at ``positions`` in raster order."""
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial)
    rows = []
    for t in positions:
        for y in range(height):
            for x in range(width):
                angles = []
                for at, dim in zip((t, y, x), dims, strict=True):
                    angles += [math.fmod(at * 10_000.0 ** (-2 * j / dim), 2 * math.pi) for j in range(dim // 2)]
                rows.append(angles)
    angle = torch.tensor(rows, dtype=torch.float64)
    return angle.cos(), angle.sin()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, S, H, D) as complex numbers times e^(i·angle)."""
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.complex(cos, sin)[None, :, None]).flatten(-2)


class ListCache:
    """What a reference processor attends to: {name: (key, value)} of one layer's frames, un-rotated, and where each stands."""

    def __init__(self) -> None:
        self.frames: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.positions: dict[Any, int] = {}
        self.new: list[Any] = []  # names of the frames of the forward under way, in order

    def see(self, positions: dict[Any, int], new: list[Any]) -> None:
        """Which frames the next forward sees, where; ``new``: its own, among them."""
        self.positions, self.new = positions, new


class ListProcessor:
    """Stands in for ``WanAttnProcessor`` on a self-attention layer."""

    def __init__(self, cache: ListCache, height: int, width: int) -> None:
        self.cache, self.height, self.width = cache, height, width

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache, tokens = self.cache, self.height * self.width
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        for i, name in enumerate(cache.new):
            rows = slice(i * tokens, (i + 1) * tokens)
            cache.frames[name] = key[:, rows].clone(), value[:, rows].clone()
        names = list(cache.positions)
        where = tables([cache.positions[name] for name in names], self.height, self.width, key.shape[-1])
        keys = turn(torch.cat([cache.frames[name][0] for name in names], 1), *where)
        values = torch.cat([cache.frames[name][1] for name in names], 1)
        own = tables([cache.positions[name] for name in cache.new], self.height, self.width, key.shape[-1])
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2).double() for x in (turn(query, *own), keys, values))
        ).transpose(1, 2)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))


def with_list_caches(denoiser: nn.Module, height: int, width: int) -> list[ListCache]:
    """Put reference processors on a stock Wan denoiser's self-attention; returns the cache of each layer."""
    caches = []
    for block in denoiser.blocks:  # type: ignore[union-attr]
        caches.append(ListCache())
        block.attn1.set_processor(ListProcessor(caches[-1], height, width))
    return caches


class MaskProcessor:
    """``WanAttnProcessor`` over a whole clip, under a mask of frames (F, F) bool: True where a row's frame sees a column's."""

    def __init__(self, seen: torch.Tensor, height: int, width: int) -> None:
        self.seen, self.height, self.width = seen, height, width

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = self.height * self.width
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        own = tables(list(range(len(self.seen))), self.height, self.width, key.shape[-1])
        mask = self.seen.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2).double() for x in (turn(query, *own), turn(key, *own), value)), attn_mask=mask
        ).transpose(1, 2)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))
