"""Where a stream's latents come from: a causal denoiser with its caches, or windows of a bidirectional pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.streaming.prompt_plan import PromptPlan
from tilewise.pipelines.streaming.pushed import PushedFrames
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe

State = tuple[dict[str, Any], dict[str, torch.Tensor]]  # JSON values, and tensors by name


class ChunkSource(ABC):
    """Makes the chunks of one stream in order.

    Attributes:
        recipe, prompts: see there.
        device: of its latents.
        pushed: the video that it changes, and strength: the noise level, 0 … 1, that it is brought to. None: it begins with noise
            alone.
        restarts: whether each chunk after the first is a clip of its own, whose first frames, ``repeats`` of them, are the last
            ones that were shown.
    """

    recipe: CausalRecipe | WindowRecipe
    prompts: PromptPlan
    device: torch.device
    restarts: bool = False
    repeats: int = 0
    pushed: PushedFrames | None = None
    strength: float = 1.0

    @property
    @abstractmethod
    def next_frame(self) -> int:
        """Number of the latent frame that comes next."""

    @property
    @abstractmethod
    def cache_bytes(self) -> dict[str, int]:
        """Memory of the KV caches: "latent": of one latent frame, "total": of all."""

    @abstractmethod
    def chunk(self, frame: int, between: Callable[[], None], ready: Callable[[torch.Tensor], None]) -> None:
        """Make the next latents.

        frame: number of the first frame of the video that they make. between: called before every pass; may raise.
        ready: called with them, normalised (1, C, t, h, w), as soon as they are finished: work for later chunks, as the pass
        that writes the KV cache, comes after it, so that frames need not wait for that.
        """

    def shown(self, frames: NDArray[np.uint8]) -> None:  # noqa: B027
        """Told of the frames (F, H, W, 3) of each chunk, before the next one is begun where ``restarts``."""

    @abstractmethod
    def view(self) -> dict[str, Any]:
        """What the next chunk is made from, as JSON values for a picture. Of caches: "kind": "cache", "window": latent frames,
        "frames": [number, "sink", "ring" or "memory"] of each that is kept. Of windows: "kind": "noise", "levels": rows of noise
        levels of the window's latent frames, "passes": the number of each row."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that a state must have in common with the stream that goes on from it."""

    @abstractmethod
    def state(self, small: bool) -> State:
        """What it needs to go on; the prompts' waiting changes are not in it."""

    @abstractmethod
    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a ``state``, with tensors on any device."""


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix.``, by the rest of it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
