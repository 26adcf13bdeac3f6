"""What the video families share: arguments by position or by name, hidden states in memory, and valid sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes


def argument(args: tuple, kwargs: dict[str, Any], at: int, name: str) -> Any:
    """The argument ``name`` of a call, which is its parameter number ``at``; None where it was not given."""
    return args[at] if len(args) > at else kwargs.get(name)


def contiguous_hidden_states(block: nn.Module) -> Any:
    """Make hidden states contiguous before a model's first block; returns the handle of the hook.

    The convolution of a patch embedding leaves the channels of a token apart in memory. Additions keep them so from block to
    block, where elementwise kernels then run at a fraction of their speed, and fused ones not at all.
    """

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].contiguous(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].contiguous()}

    return block.register_forward_pre_hook(enter, with_kwargs=True)


def check_size(denoiser: nn.Module, pipe: Any, size: Size, *, height: int, width: int, frames: int) -> None:
    """Check a size in pixels against what a model takes.

    Args:
        height, width: must be multiples of this. frames: the length must be frames·k + 1; pipelines that make images: 1.

    Raises:
        ConfigError: with the nearest valid number for each that is not.
    """
    rules = [Rule("height", size.height, height), Rule("width", size.width, width)]
    images = type(pipe).__name__.endswith(("TextToImagePipeline", "T2IPipeline", "I2IPipeline"))
    if not images:
        rules.append(Rule("frames", size.frames, frames, 1))
    wrong = wrong_sizes(*rules)
    if images and size.frames != 1:
        wrong.append(f"frames={size.frames} must be 1: it makes images")
    refuse(denoiser, wrong)
