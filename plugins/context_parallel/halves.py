"""The two halves of the processes under CFG parallelism, each with one of the two branches of classifier-free guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from tilewise.plugins.diffusers_compat import forward_wrapper
from tilewise.plugins.models.common.denoisers import ATTRIBUTE

NAME = "tilewise_cfg"  # of the hook on a denoiser
GUIDANCE_OFF = (
    "guidance is off (a guidance_scale of 1 or less, or a distilled model that takes it as an input), and there is nothing to "
    "divide between two halves of the GPUs. Use tilewise.enable_context_parallel (torchrun … --parallel context)"
)


class Halves(ABC):
    """What stands around a denoiser's forward, and divides it or its fellow in the step between two processes.

    Args:
        name: the denoiser's, for messages.
        half: 0 or 1, this process's. group: it and the process of the other half that it exchanges outputs with.
    """

    in_batch: ClassVar[bool]  # whether both branches are in one forward

    def __init__(self, name: str, half: int, group: Any) -> None:
        self.name, self.half, self.group = name, half, group

    @abstractmethod
    def __call__(self, stock: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a forward, the same in both halves. stock: the forward."""

    @property
    def sits_out(self) -> bool:
        """Whether the forward that is about to begin is the other half's."""
        return False

    @property
    def part(self) -> str:
        """Which part of the work this process has, for reports."""
        which = ("first", "second")[self.half]
        return f"the {which} half of each batch" if self.in_batch else f"the {which} forward of each step"

    def source(self, half: int) -> int:
        """The process of a half, by its number among all."""
        return dist.get_global_rank(self.group, half)

    def exchanging(self, denoiser: nn.Module, x: torch.Tensor) -> AbstractContextManager[None]:
        """For an exchange: counted and timed where the denoiser is patched."""
        patch: Any = denoiser.__dict__.get(ATTRIBUTE)
        return nullcontext() if patch is None else patch.state.call_stats.exchange(x)


def halves_of(denoiser: nn.Module) -> Halves | None:
    """What CFG parallelism put on a denoiser, or None."""
    found: Halves | None = forward_wrapper(denoiser, NAME)
    return found
