"""FreeSwim as its published code runs it, for the comparison: one doubled batch, FlexAttention over raster order, stock kernels.

Written from the paper (arXiv 2511.14712) and what its code does, on diffusers' own Wan blocks:

- both rows always go through every norm, projection and feed-forward, also where the second one is a copy of the first;
- the window is a FlexAttention block mask in raster order, the full row's attention PyTorch's;
- without a cache, both forwards of guidance have a full row at every step; with one, the prompt's forward alone, every k steps,
  and in between its cross-attention's output (before the last projection) is used again. The negative prompt's forward then has
  a window alone, and still two rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from benchmarks.flex import block_mask
from tilewise.kernels.plans.layout import Grid

REFRESH, REUSE, WINDOW = "refresh", "reuse", "window only"


@functools.cache
def _flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def raster_mask(grid: Grid, native: tuple[int, int], device: torch.device) -> Any:
    """The inward window over raster order as a FlexAttention block mask."""
    half_h, half_w = native[0] // 2, native[1] // 2

    def inside(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        qh, qw = q // grid.w % grid.h, q % grid.w
        kh, kw = k // grid.w % grid.h, k % grid.w
        top = (qh - half_h).clamp(0, max(grid.h - 2 * half_h - 1, 0))
        left = (qw - half_w).clamp(0, max(grid.w - 2 * half_w - 1, 0))
        return (kh >= top) & (kh <= top + 2 * half_h) & (kw >= left) & (kw <= left + 2 * half_w)

    return block_mask(inside, grid.tokens, device)


class FreeSwim:
    """``forward`` of a stock Wan denoiser by FreeSwim. mode: REFRESH, REUSE or WINDOW; set before each call.

    compiled: whether FlexAttention runs as one kernel; else as separate operations, for tests.
    """

    def __init__(self, model: Any, mask: Any, native: tuple[int, int], compiled: bool = True) -> None:
        self.model, self.mask, self.compiled = model, mask, compiled
        tokens = math.prod(native)
        self.scale = math.sqrt(math.log(2 * tokens, tokens) / model.config.attention_head_dim)
        self.mode = REFRESH
        self.cached: dict[int, torch.Tensor] = {}
        self.keeps = True  # whether the cross-attention's output is kept for REUSE
        for number, block in enumerate(model.blocks):
            block.attn1.set_processor(_Processor(self, None))
            block.attn2.set_processor(_Processor(self, number))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(1, C, T, h, w) to the window row's prediction, the same shape."""
        two = [torch.cat([x, x]) for x in (latents, timestep, text)]
        return self.model(*two, return_dict=False)[0][:1]

    def remove(self) -> None:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        for block in self.model.blocks:
            block.attn1.set_processor(WanAttnProcessor())
            block.attn2.set_processor(WanAttnProcessor())
        self.cached.clear()

    def attend(self, number: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(2, S, H, D) queries of the window row and the full one."""
        if number is None:
            first = (x[:1].transpose(1, 2) for x in (q, k, v))
            if self.compiled:
                window = _flex()(*first, block_mask=self.mask, scale=self.scale).transpose(1, 2)
            else:
                from torch.nn.attention.flex_attention import flex_attention

                window = flex_attention(*first, block_mask=self.mask, scale=self.scale).transpose(1, 2)
            full = window
            if self.mode == REFRESH:
                full = dispatch_attention_fn(q[1:], k[1:], v[1:], scale=self.scale)
            return torch.cat([window, full])
        if self.mode == REUSE:
            shared = self.cached[number]
        else:
            row = slice(1, 2) if self.mode == REFRESH else slice(0, 1)
            shared = dispatch_attention_fn(q[row], k[row], v[row])
            if self.mode == REFRESH and self.keeps:
                self.cached[number] = shared
        return torch.cat([shared, shared])


class _Processor:
    """Self-attention (number None) or cross-attention of one block."""

    def __init__(self, owner: FreeSwim, number: int | None) -> None:
        self.owner, self.number = owner, number

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = (_rotated(x, *rotary_emb) for x in (q, k))
        out = self.owner.attend(self.number, q, k, v).flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As diffusers' Wan processor rotates: pairs of neighbouring channels."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * c - b * s
    out[..., 1::2] = a * s + b * c
    return out
