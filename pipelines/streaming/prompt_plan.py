"""Changes of a stream's prompt that wait for their chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from tilewise.plugins.errors import ConfigError, unknown

CHANGES = ("recache", "flush", "blend")
FLUSH_KEEPS = 2  # latent frames

Waiting: TypeAlias = dict[str, tuple[dict[str, torch.Tensor], list[Any]]]  # tensors and JSON values by name


@dataclass(frozen=True)
class Change:
    """states: of the text, (1, tokens, width); None where the pipeline makes them when it needs them."""

    prompt: str
    states: torch.Tensor | None
    how: str
    over: int

    def to_state(self) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """Tensors and JSON values."""
        return {} if self.states is None else {"states": self.states}, [self.prompt, self.how, self.over]


@dataclass
class PromptPlan:
    """The prompt of a stream, and what is to become of it.

    Args:
        encode: text states of a prompt, or None.
        prompt: the present one.
    """

    encode: Callable[[str], torch.Tensor | None]
    prompt: str
    _waiting: Change | None = field(default=None, kw_only=True)
    _planned: list[tuple[int, Change]] = field(
        default_factory=list, repr=False, kw_only=True
    )  # (first frame, …), rising

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
        change = Change(prompt, self.encode(prompt), how, over)
        if frame is None:
            self._waiting = change
        else:
            self._planned = sorted([*self._planned, (frame, change)], key=lambda one: one[0])

    @property
    def planned(self) -> list[str]:
        """The prompts whose frames have not been begun."""
        return [change.prompt for _, change in self._planned]

    def due(self, frame: int) -> Change | None:
        """The change for the chunk that begins at a frame of the video, which waits no longer."""
        while self._planned and self._planned[0][0] <= frame:
            self._waiting = self._planned.pop(0)[1]
        change, self._waiting = self._waiting, None
        return change

    def waiting_state(self) -> Waiting:
        """What is not yet applied."""
        found: Waiting = {}
        if self._waiting is not None:
            found["waiting"] = self._waiting.to_state()
        if self._planned:
            tensors = {str(i): c.states for i, (_, c) in enumerate(self._planned) if c.states is not None}
            found["planned"] = tensors, [[frame, *change.to_state()[1]] for frame, change in self._planned]
        return found

    def load_waiting(self, state: Waiting, device: torch.device) -> None:
        """Set what is not yet applied."""

        def states(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
            return tensors[name].to(device) if name in tensors else None

        if "waiting" in state:
            tensors, (prompt, how, over) = state["waiting"]
            self._waiting = Change(prompt, states(tensors, "states"), how, over)
        if "planned" in state:
            tensors, told = state["planned"]
            self._planned = [
                (frame, Change(prompt, states(tensors, str(i)), how, over))
                for i, (frame, prompt, how, over) in enumerate(told)
            ]
