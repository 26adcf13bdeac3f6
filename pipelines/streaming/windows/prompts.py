"""Prompts of a stream of windows and their changes, which come with the next window.

recache   the next window has the new prompt, and goes on from the same latents
flush     it goes on from fewer latents, two at most
blend     the text states go over to the new prompt's in n windows
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewise.pipelines.streaming.prompt_plan import PromptPlan, Waiting
from tilewise.plugins.errors import UnsupportedModelError
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute


@dataclass(frozen=True)
class WindowText:
    """What a window is conditioned on: share of ``prompt``, the rest of ``before``. flush: it keeps few latents."""

    prompt: str
    before: str = ""
    share: float = 1.0
    flush: bool = False


@dataclass
class WindowPrompts(PromptPlan):
    """The prompt of a stream of windows, and what is to become of it at the next one."""

    _blend: tuple[str, int, int] | None = field(default=None, repr=False, kw_only=True)  # prompt before, over, done

    def next_text(self, frame: int) -> WindowText:
        """Apply what is waiting. frame: number of the first one of the window that comes."""
        flush = False
        if (change := self.due(frame)) is not None:
            flush = change.how == "flush"
            self._blend = (self.prompt, change.over, 0) if change.how == "blend" else None
            self.prompt = change.prompt
        if self._blend is None:
            return WindowText(self.prompt, flush=flush)
        before, over, done = self._blend
        self._blend = None if done + 1 == over else (before, over, done + 1)
        return WindowText(self.prompt, before, (done + 1) / over)

    def waiting_state(self) -> Waiting:
        blend: Waiting = {} if self._blend is None else {"blend": ({}, list(self._blend))}
        return {**super().waiting_state(), **blend}

    def load_waiting(self, state: Waiting, device: torch.device) -> None:
        super().load_waiting(state, device)
        if "blend" in state:
            before, over, done = state["blend"][1]
            self._blend = before, over, done


@contextlib.contextmanager
def blended_text(pipe: Any, text: WindowText) -> Iterator[None]:
    """Run a block in which what a pipeline encodes of its prompt is mixed with another prompt's.

    Raises UnsupportedModelError in the block for a pipeline whose prompts have states of different lengths.
    """
    if text.share == 1:
        yield
        return
    whole = pipe.encode_prompt
    names = inspect.signature(whole)

    @functools.wraps(whole)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = dict(names.bind(*args, **kwargs).arguments)
        return _mixed(whole(**{**given, "prompt": text.before}), whole(**given), text.share)

    with temporary_attribute(pipe, "encode_prompt", encode_prompt):
        yield


def _mixed(before: Any, after: Any, share: float) -> Any:
    if isinstance(after, tuple | list):
        return type(after)(_mixed(a, b, share) for a, b in zip(before, after, strict=True))
    if not isinstance(after, torch.Tensor):
        return after
    if before.shape != after.shape:
        raise UnsupportedModelError(
            f"a change of the prompt by blend: this pipeline makes states {tuple(before.shape)} of one prompt and "
            f"{tuple(after.shape)} of the other, which cannot be mixed; use recache"
        )
    if not after.is_floating_point():  # a mask: what either prompt has
        return torch.maximum(before, after)
    return torch.lerp(before, after, share)
