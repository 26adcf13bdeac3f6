"""What the video families' hooks share: arguments by position or by name, tensors that all blocks are given, valid sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tilewise.plugins.models.common.family import Reorder, Size
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes

Call = tuple[tuple, dict[str, Any]]


def argument(args: tuple, kwargs: dict[str, Any], at: int, name: str) -> Any:
    """The argument ``name`` of a call, which is its parameter number ``at``; None where it was not given."""
    return args[at] if len(args) > at else kwargs.get(name)


def changed(args: tuple, kwargs: dict[str, Any], at: int, name: str, change: Callable[[Any], Any]) -> Call:
    """The arguments of a call with ``change`` applied to one of them, if it was given and is not None."""
    value = argument(args, kwargs, at, name)
    if value is None:
        return args, kwargs
    if len(args) > at:
        return (*args[:at], change(value), *args[at + 1 :]), kwargs
    return args, {**kwargs, name: change(value)}


def reorder_in_place(x: torch.Tensor, reorder: Reorder, dim: int) -> None:
    """Bring ``x`` itself into the order in force.

    For a tensor that a model's forward makes once and passes to every block: a hook on the first block can replace it for that
    block only, and a gather in every block would cost as much as several hidden states. ``x`` must have its own memory. A token
    axis of stride 0 (one value for all tokens) needs no reordering.
    """
    if x.stride(dim) != 0:
        x.copy_(reorder.into(x, dim))


def check_size(denoiser: nn.Module, pipe: Any, size: Size, *, height: int, width: int, frames: int) -> None:
    """Check a size in pixels against what a model takes.

    Args:
        height, width: must be multiples of this. frames: num_frames must be frames·k + 1; pipelines that make images: 1.

    Raises:
        ConfigError: with the nearest valid number for each that is not.
    """
    rules = [Rule("height", size.height, height), Rule("width", size.width, width)]
    images = type(pipe).__name__.endswith(("TextToImagePipeline", "T2IPipeline", "I2IPipeline"))
    if not images:
        rules.append(Rule("num_frames", size.num_frames, frames, 1))
    wrong = wrong_sizes(*rules)
    if images and size.num_frames != 1:
        wrong.append(f"num_frames={size.num_frames} must be 1: it makes images")
    refuse(denoiser, wrong)
