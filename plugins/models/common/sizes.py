"""Sizes in pixels that a model takes unchanged: one check and one error message for all families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError

LARGEST = 100_000  # pixels of a side, and frames: past anything that fits into memory


class Rule(NamedTuple):
    """``given`` must be a positive multiple of ``step``, plus ``offset``."""

    name: str
    given: int
    step: int
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.step}·k + {self.offset}" if self.offset else f"a multiple of {self.step}"

    @property
    def nearest(self) -> int:
        return max(self.offset or self.step, self.offset + self.step * round((self.given - self.offset) / self.step))


def wrong_sizes(*rules: Rule) -> list[str]:
    """What is wrong with each size that breaks its rule, with the nearest one that does not, or is past LARGEST."""
    large = [
        f"{rule.name}={rule.given} is too large, at most {LARGEST} is taken" for rule in rules if rule.given > LARGEST
    ]
    broken = [rule for rule in rules if rule.given != rule.nearest and rule.given <= LARGEST]
    return large + [f"{rule.name}={rule.given} must be {rule}, the nearest is {rule.nearest}" for rule in broken]


def refuse(denoiser: nn.Module, wrong: list[str]) -> None:
    """Raise what is wrong with a size, if anything is.

    Raises:
        ConfigError: naming the model and everything in ``wrong``.
    """
    if wrong:
        raise ConfigError(f"{type(denoiser).__name__} does not take this size: {'; '.join(wrong)}")


def within_positions(denoiser: nn.Module, grid: Grid, most: Sequence[int]) -> Grid:
    """The grid, if the model's table of positions has ``most`` = (t, h, w) or more for it.

    Raises:
        ConfigError: naming the model, the tokens and the positions.
    """
    axes = list(zip((grid.t, grid.h, grid.w), most, strict=True))
    if any(tokens > limit for tokens, limit in axes):
        shown = axes[1:] if grid.t == most[0] == 1 else axes
        tokens, limits = ("×".join(str(axis[i]) for axis in shown) for i in (0, 1))
        raise ConfigError(
            f"{type(denoiser).__name__} does not take this size: {tokens} tokens, it has positions for {limits}"
        )
    return grid
