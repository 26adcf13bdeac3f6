"""Few-step sampling of one chunk after another, plainly: for training on the model's own output, and for a first look at it.

`tilewise.stream` is the fast one. This one keeps every chunk's keys and values in a list and runs a batch of clips at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .attention import ChunkAttention, Rotation, Window, attend, project, rotate, use_processor

Text = Callable[
    [int, bool], torch.Tensor
]  # (chunk, whether it is the pass over the finished chunk) → (B, tokens, width)


def noise_levels(timesteps: Sequence[float], shift: float) -> list[float]:
    """σ of each pass: timestep / 1000, shifted."""
    return [shift * t / (1000 + (shift - 1) * t) for t in timesteps]


class _Cached:
    """Self-attention of one layer against the finished chunks. Keys are kept unturned and turned whenever they are read."""

    def __init__(self, sampler: ChunkSampler) -> None:
        self.sampler = sampler
        self.chunks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sampler = self.sampler
        query, plain, value = project(attn, hidden_states)
        if sampler.finished:
            self.chunks.append((plain, value))
        sink, ring, shift = sampler.context()
        seen = [(self.chunks[i], i + shift) for i in sink] + [(self.chunks[i], i) for i in ring]
        parts = [*seen, ((plain, value), sampler.number)]
        keys = [rotate(key, sampler.table(at)) for (key, _), at in parts]
        out = attend(
            rotate(query, sampler.table(sampler.number)), torch.cat(keys, 1), torch.cat([v for (_, v), _ in parts], 1)
        )
        if sampler.finished and ring:  # no later chunk sees what lies before this one's window
            for index in range(len(sink), ring.start):
                self.chunks[index] = (plain.new_empty(0), value.new_empty(0))
        return attn.to_out[0](out.flatten(2).type_as(hidden_states))


class ChunkSampler:
    """Makes a batch of clips, chunk by chunk. Takes the denoiser's self-attention over while it is open (`with`)."""

    def __init__(
        self,
        denoiser: nn.Module,
        window: Window,
        rotation: Rotation,
        *,
        levels: Sequence[float],
        first_levels: Sequence[float] | None = None,
        solver: str = "euler",
        autocast: Callable[[], Any],
    ) -> None:
        self.denoiser, self.window, self.rotation = denoiser, window, rotation
        self.levels, self.first_levels = list(levels), list(first_levels or levels)
        self.solver, self.autocast = solver, autocast
        self.number, self.oldest, self.finished = 0, 0, False
        self._tables: dict[int, Any] = {}

    def __enter__(self) -> ChunkSampler:
        blocks: Any = self.denoiser.get_submodule("blocks")
        self._before = [block.attn1.processor for block in blocks]
        self.layers = [_Cached(self) for _ in blocks]
        use_processor(self.denoiser, self.layers)
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stance.__exit__(None, None, None)
        use_processor(self.denoiser, self._before)

    def context(self) -> tuple[range, range, int]:
        """`Window.context` of the chunk under way, without what was there before the cache was computed anew."""
        sink, ring, shift = self.window.context(self.number)
        if self.oldest > ring.start:
            return sink, range(self.oldest, self.number), self.oldest - len(sink)
        return sink, ring, shift

    def table(self, at: int) -> Any:
        """RoPE tables of the chunk position `at`."""
        if at not in self._tables:
            self._tables[at] = self.rotation.tables([at])
        return self._tables[at]

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
        """One pass over the chunk under way."""
        timestep = torch.full((len(latents),), sigma * 1000, device=latents.device)
        with self.autocast():
            return self.denoiser(latents, timestep, text, return_dict=False)[0].float()

    def give(self, latents: torch.Tensor, text: torch.Tensor) -> None:
        """The pass over a finished chunk (B, z, frames, h, w), which leaves its keys and values behind."""
        self.finished = True
        try:
            self.velocity(latents, 0.0, text)
        finally:
            self.finished = False
        self.number += 1

    @torch.no_grad()
    def make(self, shape: torch.Size, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next chunk's latents, of this shape; `give` has to follow."""
        levels = self.levels if self.number else self.first_levels
        x = torch.randn(shape, generator=generator, device=generator.device)
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            velocity = self.velocity(x, sigma, text)
            if self.solver == "euler":
                x = x + (following - sigma) * velocity
            else:
                clean = x - sigma * velocity
                noise = torch.randn(shape, generator=generator, device=generator.device)
                x = (1 - following) * clean + following * noise
        return x

    def recache(self, chunks: dict[int, torch.Tensor], text: torch.Tensor) -> None:
        """After a change of prompt: compute the window's keys and values anew with the new text; the sink stays."""
        _, ring, _ = self.context()
        for layer in self.layers:
            del layer.chunks[ring.start :]
        self.oldest = self.number = ring.start
        for number in ring:
            self.give(chunks[number], text)


def own_processor(denoiser: nn.Module) -> ChunkAttention:
    """Put one `ChunkAttention` into all self-attention layers, and return it."""
    processor = ChunkAttention()
    use_processor(denoiser, [processor] * len(denoiser.get_submodule("blocks")))  # type: ignore[arg-type]
    return processor
