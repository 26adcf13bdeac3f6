"""A choice kept for several denoising steps, and made anew when it no longer fits.

A choice made at tick t with estimated recall r is used at ticks t + 1 … t + refresh − 1, as long as its recall under the map of
the moment has not fallen below r − drift. Where it has, the choice is made anew at the next step: the number is copied to the
host while the device goes on, and read a whole step later, when it has long arrived, so that the device never runs dry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Later:
    """A () tensor on its way to the host."""

    def __init__(self, value: torch.Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.value = value
        if value.is_cuda:
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """The number; waits only if the device is more than a step behind."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


@dataclass(frozen=True)
class Drift:
    """refresh: ticks that a choice is kept for. drift: fall of recall that is too much; None: not tested."""

    refresh: int
    drift: float | None

    def reuse(
        self,
        memory: dict[str, Any],
        tick: int,
        choose: Callable[[], torch.Tensor],
        recall_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(kept (B, H, N, N) bool, its estimated recall ()): from ``memory`` if that still fits, else chosen now."""
        if "kept" in memory and tick - memory["tick"] < self.refresh and not self._drifted(memory):
            kept = memory["kept"]
            recall = recall_of(kept)
            if self.drift is not None:
                memory["fall"] = Later(memory["recall"] - recall)
            return kept, recall
        kept = choose()
        recall = recall_of(kept)
        memory.clear()
        memory.update(kept=kept, recall=recall, tick=tick)
        return kept, recall

    def _drifted(self, memory: dict[str, Any]) -> bool:
        fall = memory.pop("fall", None)
        return self.drift is not None and fall is not None and not fall.read() <= self.drift
