"""Chunks of a causal checkpoint: the sampler over its KV caches, the history of latents, and changes of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tilewise.pipelines.streaming.prompts import History, Prompts
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler
from tilewise.pipelines.streaming.source import ChunkSource, State, under


class CausalSource(ChunkSource):
    """See ``ChunkSource``.

    Args:
        sampler, prompts, recipe: see there.
        window: latent frames of the caches. chunk: latent frames of a chunk.
        start: latents (1, C, t, h, w) that the video begins with, as of an image.
    """

    recipe: CausalRecipe
    prompts: Prompts

    def __init__(
        self,
        sampler: CausalSampler,
        prompts: Prompts,
        recipe: CausalRecipe,
        *,
        window: int,
        chunk: int,
        start: torch.Tensor | None = None,
    ) -> None:
        self.sampler, self.prompts, self.recipe = sampler, prompts, recipe
        self.history = History(window, sampler.denoisers[0].options.sink)
        self.length, self.start = chunk, start
        self.device = sampler.device

    @property
    def next_frame(self) -> int:
        return self.sampler.next_frame

    @property
    def cache_bytes(self) -> dict[str, int]:
        plans = [denoiser.cache_plan() for denoiser in self.sampler.denoisers]
        return {"latent": sum(plan.latent for plan in plans), "total": sum(plan.total for plan in plans)}

    def chunk(self, frame: int, between: Callable[[], None], ready: Callable[[torch.Tensor], None]) -> None:
        sampler, first = self.sampler, self.sampler.next_frame
        if self.start is not None:
            latents, self.start = self.start, None
            ready(latents)
            sampler.given(latents)
        else:
            length, clean = self._length(first), None
            if self.pushed is not None:
                clean = self.pushed.take(length, between)
                if (length := clean.shape[2]) == 0:
                    return  # the video has ended
            self.prompts.before_chunk(sampler, self.history, frame)
            latents = sampler.chunk(
                length, first=first == 0, clean=clean, strength=self.strength, between=between, ready=ready
            )
        self.history.add(first, latents)

    def _length(self, first: int) -> int:
        of_first = self.recipe.first_chunk
        return of_first if first == 0 and of_first is not None else self.length

    def view(self) -> dict[str, Any]:
        denoiser = self.sampler.denoisers[0]
        slots = denoiser.slots
        frames: list[list[Any]] = [[-1, "memory"]] * (denoiser.memory if slots.frames else 0)
        frames += [[frame, "sink"] for frame in slots.frames[: slots.sink]]
        frames += [[frame, "ring"] for frame in slots.ring]
        return {"kind": "cache", "window": slots.window, "frames": frames}

    def identity(self) -> dict[str, Any]:
        configs = [denoiser.config.to_dict() for denoiser in self.sampler.denoisers]
        return {
            "recipe": self.recipe.to_dict(),
            "chunk": self.length,
            "size": list(self.sampler.shape),
            # What attention in the window runs by: it decides the order of the cache's rows too.
            "method": [{name: config[name] for name in ("method", "steps", "blocks")} for config in configs],
        }

    def state(self, small: bool) -> State:
        sampler, prompts, history = self.sampler, self.prompts, self.history
        tensors: dict[str, torch.Tensor] = {
            "generator": sampler.generator.get_state(),
            "text": prompts.states.positive,
        }
        if prompts.states.negative is not None:
            tensors["negative"] = prompts.states.negative
        values: dict[str, Any] = {
            "small": small,
            "history": [first for first, _ in history.chunks],
            "caches": [],
        }
        tensors |= {f"history.{i}": latents for i, (_, latents) in enumerate(history.chunks)}
        if history.sink is not None:
            tensors["sink"] = history.sink
        if self.start is not None:
            tensors["start"] = self.start
        for i, denoiser in enumerate(sampler.denoisers):
            plain, buffers = denoiser.state_dict()
            values["caches"].append(plain)
            if not small:
                tensors |= {f"cache.{i}.{name}": tensor for name, tensor in buffers.items()}
        return values, tensors

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        sampler, prompts, history, device = self.sampler, self.prompts, self.history, self.device
        sampler.generator.set_state(tensors["generator"])
        prompts.states.positive = tensors["text"].to(device)
        if "negative" in tensors:
            prompts.states.negative = tensors["negative"].to(device)
        history.chunks = [(first, tensors[f"history.{i}"].to(device)) for i, first in enumerate(values["history"])]
        history.sink = tensors["sink"].to(device) if "sink" in tensors else None
        for i, denoiser in enumerate(sampler.denoisers):
            denoiser.load_state_dict(values["caches"][i], under(f"cache.{i}", tensors))
        if values["small"]:
            history.restore(sampler, values["caches"][0]["slots"])
        self.start = tensors["start"].to(device) if "start" in tensors else None
