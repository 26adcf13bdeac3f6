"""What image denoisers share: names for forward arguments, and valid image sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.sizes import Rule, refuse, wrong_sizes


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name; ``names``: its parameters, in order, as far as callers pass them by position."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def image_tokens(denoiser: nn.Module, size: Size, pixels: int) -> tuple[int, int]:
    """(h, w) in tokens of an image whose tokens are ``pixels`` wide and high.

    Raises:
        ConfigError: for more than one frame, or a height or width that is not a multiple of ``pixels``, with the nearest.
    """
    wrong = wrong_sizes(Rule("height", size.height, pixels), Rule("width", size.width, pixels))
    if size.frames != 1:
        wrong.append(f"frames={size.frames} must be 1: it makes images")
    refuse(denoiser, wrong)
    return size.height // pixels, size.width // pixels
