"""What a KV cache is to the attention calls of a patched denoiser: the keys and values of a window of frames, and their order."""

from __future__ import annotations

from typing import Protocol

import torch

from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.runtime.plan_cache import Order


class KeyValueWindow(Protocol):
    """While one is set on a ``ForwardState``, the forward's tokens are a chunk of frames, and its calls attend to the window.

    Attributes:
        order: (permutation, inverse) of the order in which the window stores a chunk's rows; None: the model's own.
        step, steps: which denoising pass of the chunk this is, and how many there are.
        reason: why calls over the window are dense although the method is sparse; "" if they are not.
    """

    order: Order | None
    step: int
    steps: int
    reason: str

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk's keys and values, (B, S, H, D) in ``order``. Returns those of the whole window, as views."""

    def keys(self) -> WindowKeys:
        """How the window's chunks lie in memory; where ``reason`` is empty."""
