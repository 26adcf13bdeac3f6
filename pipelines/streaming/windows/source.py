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
from tilewise.pipelines.streaming.windows.prompts import WindowPrompts, WindowText
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
            with, by a way that restarts. needs_frame: whether its first window begins with the first frame of a pushed video.
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
        needs_frame: bool = False,
    ) -> None:
        self.needs_frame = needs_frame
        self.sampler, self.prompts, self.recipe = sampler, prompts, recipe
        self.total, self.device = total, device
        self._given = 0  # latent frames that were handed out
        self._last = start  # latents of the last window
        self._end = 0 if start is None else start.shape[2]  # number of the latent frame after it
        self._first: torch.Tensor | None = None  # statistics of the first window
        self._clean: torch.Tensor | None = None  # latents of the video that the last window was made from
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
        text = self.prompts.next_text(frame)
        before = self._last
        overlap = 0
        if before is not None:
            few = text.flush and not self.restarts and self.sampler.queue is None  # which forgets its frames
            most = FLUSH_KEEPS if few else self.recipe.window
            overlap = min(self.recipe.overlap, most, before.shape[2])
        clean, length = self._video(overlap, between)
        if length:
            ready(self._emitted(self._window(text, overlap, between, clean)[:, :, : overlap + length], overlap))
        elif before is not None and self._given < self._end:  # the video has ended; nothing changes what was held back
            latents = before[:, :, self._given - self._end :]
            self._given = self._end
            ready(latents)

    def _video(self, overlap: int, between: Callable[[], None]) -> tuple[torch.Tensor | None, int]:
        """A pushed video's latents (1, C, t, h, w) of the next window, made up with copies of the last, and how many are new."""
        window = self.recipe.window
        if self.pushed is None:
            return None, window - overlap
        new = self.pushed.take(window - overlap, between)
        if not (length := new.shape[2]):
            return None, 0
        self._clean = (
            new if self._clean is None else torch.cat([self._clean[:, :, self._clean.shape[2] - overlap :], new], 2)
        )
        missing = window - self._clean.shape[2]
        return torch.cat([self._clean, self._clean[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2), length

    def _window(
        self, text: WindowText, overlap: int, between: Callable[[], None], clean: torch.Tensor | None
    ) -> torch.Tensor:
        tail = None
        if self._last is not None and not self.restarts:
            tail = self._last[:, :, self._last.shape[2] - overlap :]
        frames = self._frames
        if self.restarts and frames is None and self.pushed is not None and self.needs_frame:
            frames = self.pushed.first
        new = self.sampler.window(tail, text, between, frames=frames, clean=clean, strength=self.strength)
        return self._guarded(new, max(overlap, 1) if self.restarts else overlap)

    def _emitted(self, new: torch.Tensor, overlap: int) -> torch.Tensor:
        """What is final, once a window is made: of a way that restarts all of it, with the frames that are there already."""
        before, begin = self._last, self._end - overlap
        self._last, self._end = new, begin + new.shape[2]
        if self.restarts:
            self._given = self._end
            return new
        held = 0 if self._is_last() or not self.sampler.way.holds_back else self.recipe.overlap
        until = self._end - held
        parts = [new[:, :, max(0, self._given - begin) : until - begin]]
        if before is not None and self._given < begin:  # held back, and not changed any more
            first = begin + overlap - before.shape[2]
            parts.insert(0, before[:, :, self._given - first : begin - first])
        self._given = until
        return torch.cat(parts, 2)

    def _is_last(self) -> bool:
        """Whether the window that was just made has the video's last latents."""
        length = None if self.pushed is None else self.pushed.latents
        return any(count is not None and self._end >= count for count in (self.total, length))

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
        values: dict[str, Any] = {"small": small, "given": self._given, "end": self._end}
        earlier = self.sampler.earlier
        if earlier and small:
            raise ConfigError(
                "state_dict(small=True): keys of earlier windows, which sink and previous keep, cannot be computed anew from "
                "latents; save the whole state"
            )
        for i, kept in enumerate(earlier):
            tensors |= {f"earlier.{i}.{name}": tensor for name, tensor in kept.state().items()}
            values["windows"] = kept.window
        if (queue := self.sampler.queue) is not None and queue.latents is not None:
            tensors["queue"], values["passed"] = queue.latents, queue.passed
        return values, tensors

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.sampler.generator.set_state(tensors["generator"])
        self._given, self._end = values["given"], values["end"]
        self._last = tensors["last"].to(self.device) if "last" in tensors else None
        self._first = tensors["first"].to(self.device) if "first" in tensors else None
        self._frames = tensors["frames"].cpu().numpy() if "frames" in tensors else None
        if self.sampler.queue is not None and "queue" in tensors:
            self.sampler.queue.latents = tensors["queue"].to(self.device)
            self.sampler.queue.passed = list(values["passed"])
        for i, kept in enumerate(self.sampler.earlier):
            kept.load_state(values["windows"], under(f"earlier.{i}", tensors), self.device)
