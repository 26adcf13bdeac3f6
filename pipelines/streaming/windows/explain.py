"""What a stream of windows would do, before anything runs: its way, attention in a window, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import OWN_VAE
from tilewise.pipelines.memory.stream_plan import StreamMemory
from tilewise.pipelines.memory.units import amount
from tilewise.pipelines.streaming.memory import window_memory
from tilewise.pipelines.streaming.windows.earlier import check_earlier
from tilewise.pipelines.streaming.windows.plan import check_windows, window_notes, window_settings, window_space
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.config import MethodLike, resolve
from tilewise.plugins.explain import Explanation
from tilewise.plugins.patching import patches_of
from tilewise.plugins.text_format import counted


@dataclass(frozen=True)
class WindowExplanation:
    """What a stream of windows would do: nothing has run.

    frames: of the first window; new: that each later one adds. window: attention and steps of a window. notes: what the model's
    training says nothing of.
    """

    recipe: WindowRecipe
    frames: int
    new: int
    window: Explanation
    memory: StreamMemory
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that only a call decides are None."""
        return {
            "recipe": self.recipe.to_dict(),
            "frames": {"window": self.frames, "new": self.new},
            "window": self.window.to_dict(),
            "memory": self.memory.to_dict(),
            "notes": self.notes,
        }

    def __str__(self) -> str:
        told = f"memory: {self.memory}" + ("" if self.memory.fits else ": it does not fit")
        length = f"the first window has {counted(self.frames, 'frame')}, each later one adds {self.new}"
        kept = self.recipe.sink + self.recipe.previous
        earlier = (
            [f"keys of earlier windows: {counted(kept, 'latent frame')}, {amount(self.memory.cache)}"] if kept else []
        )
        return "\n".join([str(self.recipe), length, str(self.window), *earlier, told, *self.memory.notes, *self.notes])


def explain_windows(
    pipe: Any,
    recipe: WindowRecipe,
    method: MethodLike,
    *,
    decode: str = OWN_VAE,
    decode_device: str | torch.device | None = None,
    device: str | torch.device | None = None,
) -> WindowExplanation:
    """See ``explain_stream``. Raises as ``check_windows``."""
    patches = patches_of(pipe)
    config = next(iter(patches.values())).config if patches else resolve(method)
    space = window_space(pipe)
    settings = window_settings(pipe, space, recipe, prompt="?", negative="", model="", method=config, seed=0)
    check_windows(pipe, recipe, settings)
    check_earlier(recipe, config)
    return WindowExplanation(
        recipe=recipe,
        frames=settings.frames,
        new=recipe.chunk * space.factors(pipe)[1],
        window=explain_settings(pipe, settings),
        memory=window_memory(
            pipe, space, settings, recipe, device=device, decode_device=decode_device, own_vae=decode == OWN_VAE
        ),
        notes=window_notes(pipe, recipe),
    )
