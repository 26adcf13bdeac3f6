"""Muon, an optimizer for weight matrices: momentum whose update is orthogonalised, all matrices of one shape at once.

A convolution's kernel counts as the matrix that maps its whole input window to the output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .checkpoints import Tensors


class Muon:
    """After Keller Jordan et al., 2024, with Nesterov momentum and the update scaled to AdamW's usual size (0.2 RMS)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    def state(self) -> Tensors:
        """The momentum, as named tensors."""
        return {"x".join(map(str, shape)): buffer for shape, buffer in self.buffers.items()}

    def load(self, tensors: Tensors) -> None:
        """Put `state` back; momentum that is missing starts from zero."""
        for shape, buffer in self.buffers.items():
            saved = tensors.get("x".join(map(str, shape)))
            buffer.zero_() if saved is None else buffer.copy_(saved)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; every parameter must have a gradient."""
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in group]).float()
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            matrices = gradient.lerp(buffer, self.momentum).flatten(2)
            update = orthogonalise(matrices) * (0.2 * math.sqrt(max(matrices.shape[1:])))
            update = update.reshape(gradient.shape)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-lr)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Push all singular values of each (B, rows, columns) matrix near 1, by a quintic Newton–Schulz iteration."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)
