"""CFG parallelism where a pipeline gives both branches of guidance to one forward, in a batch (LTX-Video, CogVideoX): each half
of the processes gets half of the batch, and both get the whole output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from tilewise.plugins.context_parallel.halves import GUIDANCE_OFF, Halves
from tilewise.plugins.context_parallel.head_exchange import gather
from tilewise.plugins.errors import ConfigError, TilewiseError


class CfgBatch(Halves):
    """Divides the batch of each forward.

    per_frame: see ``Family``.
    """

    in_batch = True

    def __init__(self, name: str, half: int, group: Any, per_frame: Collection[str] = ()) -> None:
        super().__init__(name, half, group)
        self.per_frame = per_frame

    def __call__(self, stock: Callable[..., Any], denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        names = [name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        latents = given[names[0]]
        batch = len(latents)  # a tensor, or a list with a tensor for each sample
        if batch % 2:
            raise ConfigError(
                f"CFG parallelism, {self.name}: a batch of {batch} cannot be halved. Its pipeline has both branches of "
                f"guidance in one batch: {GUIDANCE_OFF}"
            )
        lists = isinstance(latents, list)
        mine = {name: self._half(value, batch, lists, name in self.per_frame) for name, value in given.items()}
        return self._whole(denoiser, stock(**mine), batch // 2)

    def _half(self, value: Any, batch: int, lists: bool, per_frame: bool) -> Any:
        """This half's part of an argument. lists: whether a list with a value for each sample is halved."""
        if isinstance(value, torch.Tensor):
            rows = value.shape[0] if value.ndim else 0
            return value.chunk(2)[self.half] if rows and (rows == batch or (per_frame and not rows % batch)) else value
        if isinstance(value, list) and lists and len(value) == batch:
            return value[: batch // 2] if self.half == 0 else value[batch // 2 :]
        if isinstance(value, list | tuple):
            return type(value)([self._half(each, batch, lists, per_frame) for each in value])
        if type(value) is dict:
            return {name: self._half(each, batch, lists, per_frame) for name, each in value.items()}
        return value

    def _whole(self, denoiser: nn.Module, output: Any, samples: int) -> Any:
        """An output of all samples, of one of this half's."""
        if isinstance(output, torch.Tensor):
            if output.shape[0] != samples:
                raise TilewiseError(
                    f"CFG parallelism, {self.name}: an output of shape {tuple(output.shape)} for {samples} samples has no axis "
                    "of samples in front"
                )
            with self.exchanging(denoiser, output):
                return gather(output, 0, (samples, samples), self.half, self.group)
        if isinstance(output, list) and len(output) == samples and len({each.shape for each in output}) == 1:
            return list(self._whole(denoiser, torch.stack(output), samples).unbind())
        if isinstance(output, tuple):
            return tuple(self._whole(denoiser, each, samples) for each in output)
        if isinstance(output, dict):  # diffusers' outputs
            return type(output)(**{name: self._whole(denoiser, each, samples) for name, each in output.items()})
        if output is None:
            return None
        raise TilewiseError(
            f"CFG parallelism, {self.name}: an output with a {type(output).__name__} cannot be put together"
        )
