"""Chunks of a bidirectional pipeline: what is final of one window after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.streaming.prompt_plan import FLUSH_KEEPS
from tilewise.pipelines.streaming.source import ChunkSource, State, under
from tilewise.pipelines.streaming.windows.drift import matched, statistics
from tilewise.pipelines.streaming.windows.prompts import WindowPrompts
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.pipelines.streaming.windows.sampler import WindowSampler
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of, patches_of


class WindowSource(ChunkSource):
    """See ``ChunkSource``.

    Args:
        sampler, prompts, recipe: see there.
        total: latent frames of the video; None: without end. device: of the latents.
        start: latents (1, C, t, h, w) that the first window has in front, as of an image. frames: (F, H, W, 3) that it begins
            with, by a way that restarts.
    """

    recipe: WindowRecipe
    prompts: WindowPrompts

    def __init__(
        self,
        sampler: WindowSampler,
        prompts: WindowPrompts,
        recipe: WindowRecipe,
        *,
        total: int | None,
        device: torch.device,
        start: torch.Tensor | None = None,
        frames: NDArray[np.uint8] | None = None,
    ) -> None:
        self.sampler, self.prompts, self.recipe = sampler, prompts, recipe
        self.total, self.device = total, device
        self._given = 0  # latent frames that were handed out
        self._last = start  # latents of the last window
        self._end = 0 if start is None else start.shape[2]  # number of the latent frame after it
        self._first: torch.Tensor | None = None  # statistics of the first window
        self.restarts = sampler.way.restarts
        self._frames = frames
        self.repeats = 1 + (recipe.overlap - 1) * sampler.space.factors(sampler.pipe)[1]

    @property
    def next_frame(self) -> int:
        return self._given

    @property
    def cache_bytes(self) -> dict[str, int]:
        total = sum(kept.bytes for kept in self.sampler.earlier)
        return {"latent": total // max(1, self.recipe.sink + self.recipe.previous), "total": total}

    def chunk(self, frame: int, between: Callable[[], None], ready: Callable[[torch.Tensor], None]) -> None:
        ready(self._next(frame, between))

    def _next(self, frame: int, between: Callable[[], None]) -> torch.Tensor:
        text = self.prompts.next_text(frame)
        if self.restarts:
            overlap = self.recipe.overlap if self._given else 0  # which is there already
            new = self._guarded(self.sampler.window(None, text, between, frames=self._frames), max(overlap, 1))
            self._given += new.shape[2] - overlap
            return new
        before = self._last
        overlap = 0
        if before is not None:
            overlap = min(self.recipe.overlap, FLUSH_KEEPS if text.flush else self.recipe.window, before.shape[2])
        tail = None if before is None else before[:, :, before.shape[2] - overlap :]
        new = self._guarded(self.sampler.window(tail, text, between), overlap)
        begin = self._end - overlap
        self._end = begin + new.shape[2]
        held = self.recipe.overlap if self.sampler.way.holds_back else 0
        until = self._end if self.total is not None and self._end >= self.total else self._end - held
        parts = [new[:, :, max(0, self._given - begin) : until - begin]]
        if before is not None and self._given < begin:  # held back, and not changed any more
            first = begin + overlap - before.shape[2]
            parts.insert(0, before[:, :, self._given - first : begin - first])
        self._last, self._given = new, until
        return torch.cat(parts, 2)

    def _guarded(self, new: torch.Tensor, overlap: int) -> torch.Tensor:
        """A window with the statistics of the first one, but for its first latents."""
        if self._first is None:
            self._first = statistics(new)
        elif self.recipe.adain:
            own = matched(new[:, :, overlap:], self._first, self.recipe.adain)
            new = torch.cat([new[:, :, :overlap], own], 2)
        return new

    def shown(self, frames: NDArray[np.uint8]) -> None:
        if self.restarts and len(frames):
            before = [] if self._frames is None else [self._frames]
            self._frames = np.concatenate([*before, frames])[-self.repeats :]

    def view(self) -> dict[str, Any]:
        return {"kind": "noise", **self.sampler.levels(0 if self._last is None else self.recipe.overlap)}

    def identity(self) -> dict[str, Any]:
        configs = [patch.config.to_dict() for patch in patches_of(self.sampler.pipe).values()]
        return {
            "recipe": self.recipe.to_dict(),
            "size": list(self.sampler.shape),
            "method": configs,
            "models": [type(one).__name__ for one in denoisers_of(self.sampler.pipe).values()],
            "negative": self.sampler.settings.negative,
        }

    def state(self, small: bool) -> State:
        tensors = {"generator": self.sampler.generator.get_state()}
        tensors |= {} if self._last is None else {"last": self._last}
        tensors |= {} if self._first is None else {"first": self._first}
        tensors |= {} if self._frames is None else {"frames": torch.from_numpy(self._frames)}
        values = {"small": small, "given": self._given, "end": self._end}
        earlier = self.sampler.earlier
        if earlier and small:
            raise ConfigError(
                "state_dict(small=True): keys of earlier windows, which sink and previous keep, cannot be computed anew from "
                "latents; save the whole state"
            )
        for i, kept in enumerate(earlier):
            tensors |= {f"earlier.{i}.{name}": tensor for name, tensor in kept.state().items()}
            values["windows"] = kept.window
        return values, tensors

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.sampler.generator.set_state(tensors["generator"])
        self._given, self._end = values["given"], values["end"]
        self._last = tensors["last"].to(self.device) if "last" in tensors else None
        self._first = tensors["first"].to(self.device) if "first" in tensors else None
        self._frames = tensors["frames"].cpu().numpy() if "frames" in tensors else None
        for i, kept in enumerate(self.sampler.earlier):
            kept.load_state(values["windows"], under(f"earlier.{i}", tensors), self.device)
