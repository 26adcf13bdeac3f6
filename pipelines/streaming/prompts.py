"""Prompts of a stream and their changes.

recache   the last frames' keys and values are computed anew with the new prompt, the sink stays   (LongLive, arXiv 2509.22622)
flush     all frames but the sink and the last two are forgotten                                   (∞-RoPE)
blend     the text states go over to the new prompt's in n chunks

The first two begin a new shot, for policies of the cache that keep the first frames of one (LongLive 2.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.plugins.errors import ConfigError, unknown

CHANGES = ("recache", "flush", "blend")
FLUSH_KEEPS = 2  # latent frames


@dataclass
class _Blend:
    begin: torch.Tensor
    end: torch.Tensor
    over: int
    done: int = 0


_Change: TypeAlias = tuple[str, torch.Tensor, str, int]  # prompt, text states, how, over


@dataclass
class Prompts:
    """The prompt of a stream, and what is to become of it at the next chunk.

    Args:
        encode: text states (1, tokens, width) of a prompt.
        prompt: the present one. states: its text states, and the negative prompt's.
    """

    encode: Callable[[str], torch.Tensor]
    prompt: str
    states: TextStates
    _waiting: _Change | None = None
    _planned: list[tuple[int, _Change]] = field(default_factory=list, repr=False)  # (first frame, change), rising
    _blend: _Blend | None = field(default=None, repr=False)

    def change(self, prompt: str, how: str, over: int, frame: int | None = None) -> None:
        """From the next chunk on, or from the first chunk on that begins at a frame of the video or after it. A change that is
        still waiting for the same chunk is replaced.

        Raises:
            ConfigError: an empty prompt, an unknown ``how``, or ``over`` below 1.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError("set_prompt: the prompt is empty: say what the video should show")
        if how not in CHANGES:
            raise unknown("way to change a prompt", how, CHANGES)
        if not isinstance(over, int) or over < 1:
            raise ConfigError(f"set_prompt: over must be a whole number of chunks, at least 1, not {over!r}")
        change = prompt, self.encode(prompt), how, over
        if frame is None:
            self._waiting = change
        else:
            self._planned = sorted([*self._planned, (frame, change)], key=lambda one: one[0])

    @property
    def planned(self) -> list[str]:
        """The prompts whose frames have not been begun."""
        return [change[0] for _, change in self._planned]

    def waiting_state(self) -> dict[str, tuple[dict[str, torch.Tensor], list[Any]]]:
        """What is not yet applied: tensors and JSON values by name."""
        found: dict[str, tuple[dict[str, torch.Tensor], list[Any]]] = {}
        if self._waiting is not None:
            prompt, states, how, over = self._waiting
            found["waiting"] = {"states": states}, [prompt, how, over]
        if self._planned:
            of_planned = {str(i): change[1] for i, (_, change) in enumerate(self._planned)}
            found["planned"] = of_planned, [[frame, told[0], *told[2:]] for frame, told in self._planned]
        if (blend := self._blend) is not None:
            found["blend"] = {"begin": blend.begin, "end": blend.end}, [blend.over, blend.done]
        return found

    def load_waiting(self, state: dict[str, tuple[dict[str, torch.Tensor], list[Any]]]) -> None:
        """Set what is not yet applied."""
        device = self.states.positive.device
        if "waiting" in state:
            tensors, (prompt, how, over) = state["waiting"]
            self._waiting = prompt, tensors["states"].to(device), how, over
        if "planned" in state:
            tensors, told = state["planned"]
            self._planned = [
                (frame, (prompt, tensors[str(i)].to(device), how, over))
                for i, (frame, prompt, how, over) in enumerate(told)
            ]
        if "blend" in state:
            tensors, (over, done) = state["blend"]
            self._blend = _Blend(tensors["begin"].to(device), tensors["end"].to(device), over, done)

    def before_chunk(self, sampler: CausalSampler, history: History, frame: int) -> None:
        """Apply what is waiting, between two chunks. frame: number of the first one of the chunk that comes."""
        while self._planned and self._planned[0][0] <= frame:
            self._waiting = self._planned.pop(0)[1]
        if self._waiting is not None:
            prompt, states, how, over = self._waiting
            if how == "blend":
                self._blend = _Blend(self.states.positive, states, over)
            else:
                self._blend = None
                self.states.positive = states
                if how == "recache":
                    history.rewrite(sampler)
                else:
                    for denoiser in sampler.denoisers:
                        denoiser.flush(FLUSH_KEEPS)
                for denoiser in sampler.denoisers:  # behind the frames that were run again
                    denoiser.new_shot()
                if sampler.denoisers[0].policy.name == "shot":
                    history.new_shot()
            self.prompt, self._waiting = prompt, None
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
