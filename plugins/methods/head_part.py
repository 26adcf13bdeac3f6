"""Some heads of a layer, in a process that shares the layer with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

Heads = range | tuple[int, ...]


@lru_cache(maxsize=1024)
def _index(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


def some_heads(x: torch.Tensor, heads: Heads, dim: int) -> torch.Tensor:
    """Of a tensor with all heads along axis ``dim``, these: a view where they are neighbours."""
    if isinstance(heads, range):
        return x.narrow(dim, heads.start, len(heads))
    return x.index_select(dim, _index(heads, x.device))


@dataclass(frozen=True)
class HeadPart:
    """own: the heads of this process. total: of the layer. whole: (B, h, …) of own heads, from all processes → (B, H, …) of all.

    All processes call ``whole`` equally often and in the same order. It waits for no device.
    """

    own: Heads
    total: int
    whole: Callable[[torch.Tensor], torch.Tensor]
