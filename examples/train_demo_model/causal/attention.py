"""Block-causal self-attention for training: every chunk attends to a sink, to a window of finished chunks and to itself.

The denoiser takes each chunk as a clip of its own, with its own timestep and text; only its self-attention looks beyond the
chunk. One forward holds the chunks 0 … n−1 finished ("clean") and, behind them, noisy chunks that may be of any number
0 … n: teacher forcing. Keys are turned by RoPE to where they stand for the chunk that looks at them: the sink moves along, just
before the window ("clamped", as in ∞-RoPE, arXiv 2511.20649), so that distances are the same after a minute as after a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, (..., tokens, 1, head_dim / 2)


@dataclass(frozen=True)
class Window:
    """Lengths in chunks: the window with sink and the chunk itself included, and the sink."""

    window: int
    sink: int

    def context(self, chunk: int) -> tuple[range, range, int]:
        """For the chunk with this number: chunks of its sink and of its window, and by how many chunks the sink has moved."""
        sink = range(min(self.sink, chunk))
        first = max(len(sink), chunk - (self.window - self.sink - 1))
        return sink, range(first, chunk), first - len(sink)


class Rotation:
    """RoPE tables of chunks of `frames` latent frames, from the denoiser's own, which are those of its position 0 … 1023."""

    def __init__(self, denoiser: nn.Module, frames: int, height: int, width: int) -> None:
        rope: Any = denoiser.get_submodule("rope")
        self.frames, self.height, self.width = frames, height, width
        sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
        self.parts = [
            (cos[:, 0::2], sin[:, 1::2])
            for cos, sin in zip(rope.freqs_cos.split(sizes, 1), rope.freqs_sin.split(sizes, 1), strict=True)
        ]

    def tables(self, chunks: Sequence[int]) -> Tables:
        """For chunks that stand at these numbers: (chunks, tokens, 1, head_dim / 2) each, float32."""
        device = self.parts[0][0].device
        at = torch.tensor(chunks, device=device)[:, None] * self.frames + torch.arange(self.frames, device=device)
        shape = (len(chunks), self.frames, self.height, self.width, -1)
        result = []
        for which in (0, 1):
            time, row, column = (part[which].float() for part in self.parts)
            rows = row[None, None, : self.height, None].expand(shape)
            columns = column[None, None, None, : self.width].expand(shape)
            whole = torch.cat([time[at][:, :, None, None].expand(shape), rows, columns], -1)
            result.append(whole.flatten(1, 3)[:, :, None].contiguous())
        return result[0], result[1]


def rotate(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Turn (…, tokens, heads, head_dim) by tables that broadcast to it; pairs of channels lie side by side."""
    cos, sin = tables
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).type_as(x)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Dense attention of (B, tokens, heads, head_dim)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


class Layout:
    """What stands in one forward: clean chunks 0 … clean−1, then noisy chunks with the numbers `noisy`; and who sees whom."""

    def __init__(self, rotation: Rotation, clean: int, noisy: Sequence[int], window: Window) -> None:
        self.clean, self.noisy, self.window = clean, tuple(noisy), window
        self.numbers = (*range(clean), *self.noisy)
        self.own = rotation.tables(self.numbers)
        contexts = {number: window.context(number) for number in set(self.numbers)}
        if missing := [number for number in contexts if number > clean]:
            raise ValueError(f"chunks {missing} have no context among {clean} clean chunks")
        self.contexts = contexts
        shifts = sorted({shift for sink, _, shift in contexts.values() if len(sink)})
        self.shift_rows = {shift: row for row, shift in enumerate(shifts)}
        at = [[chunk + shift for chunk in range(window.sink)] for shift in shifts]
        self.sink_tables = [rotation.tables(row) for row in at]  # one a shift, (sink, tokens, 1, head_dim / 2)

    @torch.compiler.disable
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plain: torch.Tensor
    ) -> torch.Tensor:
        """(B, chunks, tokens, heads, head_dim) each; `plain` is the key before its rotation, which the sink needs."""
        batch, sinks = len(query), min(self.window.sink, self.clean)
        turned = [rotate(plain[:, :sinks], (cos[:sinks], sin[:sinks])) for cos, sin in self.sink_tables]
        outputs: list[torch.Tensor | None] = [None] * len(self.numbers)
        for number, (sink, ring, shift) in self.contexts.items():
            rows = [row for row, other in enumerate(self.numbers) if other == number]
            before_k = [key[:, i] for i in ring]
            before_v = [value[:, i] for i in (*sink, *ring)]
            if len(sink):
                before_k = [turned[self.shift_rows[shift]][:, i] for i in sink] + before_k
            # Everything that stands at this number sees the same context: one call, the copies along the batch.
            own = [torch.cat([*before_k, key[:, row]], 1) for row in rows]
            values = [torch.cat([*before_v, value[:, row]], 1) for row in rows]
            out = attend(torch.cat([query[:, row] for row in rows]), torch.cat(own), torch.cat(values))
            for place, row in enumerate(rows):
                outputs[row] = out[place * batch : (place + 1) * batch]
        return torch.stack([out for out in outputs if out is not None], 1)


class ChunkAttention:
    """The processor of every self-attention layer: projections and norms as in the stock one, then the layout's attention."""

    def __init__(self) -> None:
        self.layout: Layout | None = None

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout = self.layout
        assert layout is not None
        chunks = len(layout.numbers)
        query, plain, value = project(attn, hidden_states)
        query, plain, value = (x.unflatten(0, (-1, chunks)) for x in (query, plain, value))
        query, key = rotate(query, layout.own), rotate(plain, layout.own)
        out = layout(query, key, value, plain)
        return attn.to_out[0](out.flatten(0, 1).flatten(2).type_as(hidden_states))


def project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (B, tokens, heads, head_dim) before their rotation."""
    query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
    # A norm in float32 leaves float32 behind, also where the projections computed in bf16.
    return tuple(part.to(value.dtype).unflatten(2, (attn.heads, -1)) for part in (query, key, value))  # type: ignore[return-value]


def use_processor(denoiser: nn.Module, processors: Sequence[Any]) -> None:
    """One processor for the self-attention of each block."""
    for block, processor in zip(denoiser.get_submodule("blocks"), processors, strict=True):  # type: ignore[call-overload]
        block.attn1.set_processor(processor)
