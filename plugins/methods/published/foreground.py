"""``foreground``: more of the budget for queries of a place that matters, by a mask or by words (RefAM, arXiv 2509.22650).

    place      blocks of which ``mask`` is at least ½ in the mean; or the ``share`` of the blocks whose queries look most at the
               text tokens ``words``:  mean over heads of Σ_{k in words} softmax over text of scale · q̄ᵢ·k
    densities  d_in = ``boost`` · d_out,    share of the place · d_in + the rest · d_out = density,    d_in at most 1
    kept       the best key blocks of each row, as ``draft`` does, by the density of its query block

An object then has detail where the background is coarse, at as many pairs. Attention to words shows where they are, as RefAM uses
it for segmentation; here that is read from text in the same sequence. Models whose text has a cross-attention of its own take a
mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.mean_map import mean_map
from tilewise.plugins.methods.dynamic.options import fraction, is_number
from tilewise.plugins.methods.dynamic.selection import select

MIDDLE = ((0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0))


@register
@dataclass(frozen=True)
class Foreground(DensityMethod):
    """Gives queries of an object more key blocks than the background, at as many pairs.

    Args:
        mask: where the object is: rows of numbers from 0 to 1, as many and as long as you like, stretched over the frame; the
            same for all frames. Default: the middle.
        words: instead of ``mask``: (first, last) of the text tokens that name it, from 0, of text in the model's own sequence.
        share: with ``words``: share of the video's blocks that are taken for the object, in (0, 1].
        boost: density of its queries ÷ density of the others, at least 1.

    Raises:
        ConfigError: for values that cannot be.
    """

    mask: tuple[tuple[float, ...], ...] | None = None
    words: tuple[int, int] | None = None
    share: float = 0.25
    boost: float = 3.0

    name: ClassVar[str] = "foreground"
    source: ClassVar[str] = "words by RefAM, arXiv 2509.22650; the rule of this project"
    use: ClassVar[str] = "clips with one object that matters, such as a face"
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density",), ("mask", "words"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None and self.words is not None:
            raise ConfigError("foreground: give mask or words, not both: each says where the object is")
        if self.words is not None:
            object.__setattr__(self, "words", _words(self.words))
        else:
            object.__setattr__(self, "mask", _mask(MIDDLE if self.mask is None else self.mask))
        fraction(self, "share")
        if not (is_number(self.boost) and self.boost >= 1):
            raise ConfigError(f"foreground: boost must be at least 1, got {self.boost!r}")

    def refuses_call(self, layout: Layout) -> str | None:
        if self.words is not None and layout.grid.text <= self.words[1]:
            return (
                f"words {self.words} are text tokens of the sequence, which has {layout.grid.text}; give mask for a model whose "
                "text has a cross-attention of its own"
            )
        return super().refuses_call(layout)

    def refuses_window(self) -> str | None:
        return "its place is one of a whole clip, and not of a KV cache"

    def refuses_some_heads(self) -> str | None:
        if self.words is not None:
            return "words are looked for by all heads, and each rank has some; give mask"
        return super().refuses_some_heads()

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        if self.words is None:
            return means.draft()
        grid, (first, last) = layout.grid, self.words
        text = key[:, : grid.text] if grid.text_first else key[:, grid.video :]
        scores = scale * (means.query.transpose(1, 2) @ per_query_head(text, query.shape[2]).float().transpose(2, 3))
        return means.draft(scores.softmax(-1)[..., first : last + 1].sum(-1).mean(1))  # (B, N)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        c = candidates
        assert self.density is not None
        text = c.layout.block_table(c.logits.device)[2]
        if self.words is None:
            place = masked_blocks(c.layout, self.mask or MIDDLE, c.logits.device)[None]
            rows, there = (
                c.layout.block_rows.double(),
                masked_blocks(c.layout, self.mask or MIDDLE, torch.device("cpu")),
            )
            part = float(rows[there].sum() / rows[~c.layout.is_text].sum())
        else:
            assert c.scores is not None
            video = int((~c.layout.is_text).sum())
            count = max(1, round(self.share * video))
            seen = c.scores.masked_fill(text, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            place, part = seen < count, count / video
        inside, outside = densities(c.density_of_rows(self.density), part, self.boost)
        many, few = (
            select("rows", c.ranked, c.always, c.key_rows, density=density) for density in (inside, max(outside, 1e-6))
        )
        return torch.where(place[:, None, :, None], many, few)


def densities(density: float, part: float, boost: float) -> tuple[float, float]:
    """(inside, outside): of the place, which is ``part`` of all, and of the rest, together ``density``."""
    outside = density / (part * boost + 1 - part)
    if boost * outside <= 1:
        return boost * outside, outside
    return 1.0, (density - part) / (1 - part) if part < 1 else density


def masked_blocks(layout: Layout, mask: tuple[tuple[float, ...], ...], device: torch.device) -> torch.Tensor:
    """(N,) bool: the blocks of video of which a mask, stretched over the frame, is at least ½ in the mean."""

    def make() -> torch.Tensor:
        _, y, x = layout.coords
        values = torch.tensor(mask, dtype=torch.float64)
        rows, columns = values.shape
        at = (y.clamp_min(0) * rows // layout.grid.h, x.clamp_min(0) * columns // layout.grid.w)
        of_block = torch.repeat_interleave(torch.arange(layout.blocks), layout.block_rows)
        sums = torch.zeros(layout.blocks, dtype=torch.float64).index_add_(0, of_block, values[at])
        with torch.inference_mode(False):
            return ((sums / layout.block_rows >= 0.5) & ~layout.is_text).to(device)

    return layout.cached(("foreground", mask, device), make)


def _mask(given: Any) -> tuple[tuple[float, ...], ...]:
    listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    rows = [row for row in given if isinstance(row, Sequence) and not isinstance(row, str) and row] if listed else []
    good = listed and len(rows) == len(given) and len({len(row) for row in rows}) == 1
    if not good or not all(is_number(value) and 0 <= value <= 1 for row in rows for value in row):
        raise ConfigError(
            f"foreground: mask must be rows of the same length with numbers in [0, 1], such as ((0, 1), (0, 0)), got {given!r}"
        )
    return tuple(tuple(float(value) for value in row) for row in rows)


def _words(given: Any) -> tuple[int, int]:
    good = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    if (
        not good
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in given)
        or not 0 <= given[0] <= given[1]
    ):
        raise ConfigError(
            f"foreground: words must be the first and the last of the text tokens, such as (3, 4), got {given!r}"
        )
    return (given[0], given[1])
