"""Prompts of a stream and their changes.

recache   the last frames' keys and values are computed anew with the new prompt, the sink stays   (LongLive, arXiv 2509.22622)
flush     all frames but the sink and the last two are forgotten                                   (∞-RoPE)
blend     the text states go over to the new prompt's in n chunks

The first two begin a new shot, for policies of the cache that keep the first frames of one (LongLive 2.0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tilewise.pipelines.streaming.prompt_plan import FLUSH_KEEPS, PromptPlan, Waiting
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates


@dataclass
class _Blend:
    begin: torch.Tensor
    end: torch.Tensor
    over: int
    done: int = 0


@dataclass
class Prompts(PromptPlan):
    """The prompt of a stream, and what is to become of it at the next chunk.

    Args:
        encode: text states (1, tokens, width) of a prompt.
        prompt: the present one. states: its text states, and the negative prompt's.
    """

    states: TextStates
    _blend: _Blend | None = field(default=None, repr=False, kw_only=True)

    def waiting_state(self) -> Waiting:
        found = super().waiting_state()
        if (blend := self._blend) is not None:
            found["blend"] = {"begin": blend.begin, "end": blend.end}, [blend.over, blend.done]
        return found

    def load_waiting(self, state: Waiting, device: torch.device) -> None:
        super().load_waiting(state, device)
        if "blend" in state:
            tensors, (over, done) = state["blend"]
            self._blend = _Blend(tensors["begin"].to(device), tensors["end"].to(device), over, done)

    def before_chunk(self, sampler: CausalSampler, history: History, frame: int) -> None:
        """Apply what is waiting, between two chunks. frame: number of the first one of the chunk that comes."""
        if (change := self.due(frame)) is not None:
            assert change.states is not None
            if change.how == "blend":
                self._blend = _Blend(self.states.positive, change.states, change.over)
            else:
                self._blend = None
                self.states.positive = change.states
                if change.how == "recache":
                    history.rewrite(sampler)
                else:
                    for denoiser in sampler.denoisers:
                        denoiser.flush(FLUSH_KEEPS)
                for denoiser in sampler.denoisers:  # behind the frames that were run again
                    denoiser.new_shot()
                if sampler.denoisers[0].policy.name == "shot":
                    history.new_shot()
            self.prompt = change.prompt
        if (blend := self._blend) is not None:
            blend.done += 1
            self.states.positive = torch.lerp(blend.begin, blend.end, blend.done / blend.over)
            if blend.done == blend.over:
                self.states.positive, self._blend = blend.end, None


class History:
    """Clean latents of the frames that a window can hold, for computing their keys anew.

    window, sink: frames to remember, of the last ones and of the first.
    """

    def __init__(self, window: int, sink: int) -> None:
        self.window = window
        self.length = sink
        self.sink: torch.Tensor | None = None  # (1, C, at most length, h, w)
        self._is_shot = False
        self.chunks: list[tuple[int, torch.Tensor]] = []  # (first frame, (1, C, t, h, w)), oldest first

    def add(self, first: int, latents: torch.Tensor) -> None:
        """The latents of a finished chunk."""
        self.chunks.append((first, latents))
        if self._is_shot and self.sink is not None and self.sink.shape[2] == self.length:
            new = latents[:, :, : self.length]
            self.sink = torch.cat([new, self.sink[:, :, new.shape[2] :]], 2)
        self._is_shot = False
        if first < self.length:
            parts = [latents] if self.sink is None else [self.sink, latents]
            self.sink = torch.cat(parts, 2)[:, :, : self.length]
        newest = first + latents.shape[2]
        while newest - (self.chunks[0][0] + self.chunks[0][1].shape[2]) >= self.window:
            del self.chunks[0]

    def new_shot(self) -> None:
        """The first frames of the next chunk take the sink's place."""
        self._is_shot = True

    def rewrite(self, sampler: CausalSampler) -> None:
        """Compute the keys and values of the ring anew with the sampler's present text."""
        ring = sampler.denoisers[0].slots.ring
        if not ring:
            return
        parts = self._since(ring[0])
        sampler.rewrite(torch.cat(parts, 2), [part.shape[2] for part in parts])

    def restore(self, sampler: CausalSampler, slots: dict[str, Any]) -> None:
        """Fill empty caches from the latents. slots: the bookkeeping of the caches that there were."""
        frames = slots["frames"]
        ring = sorted(frames[self.length :])
        for denoiser in sampler.denoisers:
            denoiser.reset()
        if self.sink is not None and frames:
            sampler.given(self.sink[:, :, : len(frames)])
        for denoiser in sampler.denoisers:
            denoiser.slots.next_frame = ring[0] if ring else slots["next_frame"]
        for part in self._since(ring[0]) if ring else []:
            sampler.given(part)

    def _since(self, frame: int) -> list[torch.Tensor]:
        """The latents from a frame on, chunk by chunk."""
        cut = [(max(0, frame - first), latents) for first, latents in self.chunks]
        return [latents[:, :, start:] for start, latents in cut if start < latents.shape[2]]
