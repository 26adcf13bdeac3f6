"""The attention calls that are timed: of a model at a size, or as they are given."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tilewise.kernels.attention.dispatch import MAX_HEAD_DIM
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.explain import MOST_TOKENS
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of

SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(?:\+(\d+))?:(\d+)x(\d+)")
SHORTEST = 256  # tokens: shorter calls take as long as their launches


@dataclass(frozen=True)
class Shape:
    """Self-attention over a grid of latent tokens: one sample, ``heads`` heads of ``head_dim``."""

    grid: Grid
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.grid}, {self.heads} heads × {self.head_dim}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``21x45x80:12x128``, with text in the same sequence ``30x45x80+256:24x128``.

        Raises:
            ConfigError: for what cannot be read or run.
        """
        found = SHAPE.fullmatch(text.strip().lower().replace("×", "x"))
        if found is None:
            raise ConfigError(
                f"--shape {text!r}: give frames x rows x columns of latent tokens, then heads x head dimension, as in "
                "21x45x80:12x128; with 256 tokens of text, 21x45x80+256:12x128"
            )
        t, h, w, text_tokens, heads, head_dim = (int(number or 0) for number in found.groups())
        if min(t, h, w, heads, head_dim) < 1 or head_dim > MAX_HEAD_DIM or t * h * w + text_tokens > MOST_TOKENS:
            raise ConfigError(
                f"--shape {text!r}: each number must be at least 1, the head dimension at most {MAX_HEAD_DIM}, and the "
                f"tokens at most {MOST_TOKENS:,}"
            )
        return cls(Grid(t, h, w, text_tokens), heads, head_dim)

    def shorter(self) -> Iterator[Shape]:
        """The same call over ever fewer tokens, the longest first: half the frames each time, then half of each frame."""
        grid = self.grid
        while True:
            yield dataclasses.replace(self, grid=grid)
            if grid.t > 1:
                grid = dataclasses.replace(grid, t=math.ceil(grid.t / 2))
            elif grid.h >= grid.w:
                grid = dataclasses.replace(grid, h=math.ceil(grid.h / 2))
            else:
                grid = dataclasses.replace(grid, w=math.ceil(grid.w / 2))
            if grid.video < SHORTEST:
                return


def shapes_of_model(pipe: Any, size: Size, configs: list[Config]) -> tuple[list[Shape], list[Config]]:
    """The longest call of each head dimension that a model makes at a size, and the methods with what they need of it.

    Raises:
        ConfigError: a size that the model does not take, or a method that does not fit it.
        UnsupportedModelError: no family serves it.
    """
    longest: dict[int, Shape] = {}
    prepared = configs
    for denoiser in denoisers_of(pipe).values():
        family = family_of(denoiser)
        assert family is not None
        prepared = [config.prepare(pipe, denoiser) for config in configs]
        grid = family.grid_of_size(denoiser, pipe, size)
        for layer in family.layers(denoiser):
            shape = Shape(layer.grid(grid), layer.heads, layer.head_dim)
            if layer.head_dim not in longest or shape.grid.tokens > longest[layer.head_dim].grid.tokens:
                longest[layer.head_dim] = shape
    return list(longest.values()), prepared
