"""What ``tilewise tune`` found on this machine, for the kernels of this process: which backend, and which tiles.

Empty until ``patch`` has read a file of this machine (plugins/tuning/). Nothing here changes what a call computes beyond
rounding: all backends and tiles give the same attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class TunedKernels:
    """Choices for one chip.

    Attributes:
        tiles: (kernel, width of the head, whether the plan has partial blocks) → (rows, keys, stages, warps).
        backends: (head dimension, whether the plan has partial blocks) → names of backends, the fastest first.
    """

    tiles: Mapping[tuple[str, int, bool], tuple[int, int, int, int]] = field(default_factory=dict)
    backends: Mapping[tuple[int, bool], tuple[str, ...]] = field(default_factory=dict)


Found: TypeAlias = Mapping[
    str, tuple[str, TunedKernels]
]  # device, as PyTorch names it ("cpu", "cuda:0") → (chip, choices)
_found: Found = {}  # replaced and never changed: other threads may be looking things up


def use(found: Found) -> Found:
    """From here on, devices run by these choices and by no others; returns those before."""
    global _found
    before, _found = _found, dict(found)
    return before


def tile(kernel: str, chip: str, width: int, intervals: bool) -> tuple[int, int, int, int] | None:
    """The tile chosen for a kernel on a chip, or None."""
    for its_chip, choices in _found.values():
        if its_chip == chip:
            return choices.tiles.get((kernel, width, intervals))
    return None


def backends(device: torch.device, head_dim: int, intervals: bool) -> tuple[str, ...]:
    """Names of backends in the order that was measured on a device, the fastest first; () where nothing was."""
    if not _found:
        return ()
    _, choices = _found.get(device_key(device), ("", None))
    return () if choices is None else choices.backends.get((head_dim, intervals), ())


def device_key(device: torch.device) -> str:
    """The name of a device that choices are kept by."""
    return f"{device.type}:{device.index or 0}" if device.type == "cuda" else device.type
