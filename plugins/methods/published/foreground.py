"""``foreground``: more of the budget for queries of a place that matters, by a mask or by words (RefAM, arXiv 2509.22650).

    place      blocks of which ``mask`` is at least ½ in the mean; or the ``share`` of the blocks that look most at ``words``
    densities  d_in = ``boost`` · d_out,    share of the place · d_in + the rest · d_out = density,    d_in at most 1
    kept       the best key blocks of each row, as ``draft`` does, by the density of its query block

An object then has detail where the background is coarse, at as many pairs. Attention to words shows where they are, as RefAM uses
it for segmentation. Where text has a cross-attention of its own, all its layers are read in the dense steps (word_maps.py). Where
text stands in the same sequence, each call reads its own, by mean queries q̄ᵢ:

    mean over heads of Σ_{k in words} softmax over text of scale · q̄ᵢ·k
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.plans.layout import Layout
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import register
from tilewise.plugins.methods.dynamic.block_logits import per_query_head
from tilewise.plugins.methods.dynamic.density_method import DensityMethod
from tilewise.plugins.methods.dynamic.map_method import Candidates, DraftMap
from tilewise.plugins.methods.dynamic.mean_map import mean_map
from tilewise.plugins.methods.dynamic.options import fraction, is_number
from tilewise.plugins.methods.dynamic.selection import select
from tilewise.plugins.methods.dynamic.word_maps import WordMaps, cross_attention
from tilewise.plugins.models.common.registry import family_of

if TYPE_CHECKING:
    from tilewise.plugins.runtime.forward_state import ForwardState

MIDDLE = ((0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0))


@register
@dataclass(frozen=True)
class Foreground(DensityMethod):
    """Gives queries of an object more key blocks than the background, at as many pairs.

    Args:
        mask: where the object is: rows of numbers from 0 to 1, as many and as long as you like, stretched over the frame; the
            same for all frames. Default: the middle.
        words: instead of ``mask``: what the model's attention to the text is read for. Words of the prompt, such as "circle" or
            ("red", "circle"), where text has a cross-attention over the prompt's tokens (Wan, SkyReels-V2, LTX-Video, Allegro,
            UNets); or (first, last) of the text tokens, from 0, there and where text is part of the sequence.
        share: with ``words``: share of the video's blocks that are taken for the object, in (0, 1].
        boost: density of its queries ÷ density of the others, at least 1.

    Raises:
        ConfigError: for values that cannot be.
    """

    mask: tuple[tuple[float, ...], ...] | None = None
    words: tuple[int, int] | tuple[str, ...] | None = None
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

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with the cross-attention that it reads, if there is one.

        Raises:
            ConfigError: words by name, for a model in whose text they cannot be found.
        """
        found = super().prepare(target, denoiser)
        if found.words is None:
            return found
        layers, family = cross_attention(denoiser), family_of(denoiser)
        if isinstance(found.words[0], str) and not (layers and family is not None and family.prompt_tokens):
            raise ConfigError(
                f"foreground: {type(denoiser).__name__} has no cross-attention over the prompt's own tokens, in which "
                f"{', '.join(map(str, found.words))} could be found; give the numbers of text tokens, as in words=(3, 4), or mask"
            )
        maps = WordMaps(found.words, layers) if layers else None
        found = dataclasses.replace(found)
        object.__setattr__(found, "_maps", maps)
        return found

    def target(self) -> dict[str, Any]:
        said = {"mask": self.mask} if self.words is None else {"words": self.words, "share": self.share}
        return {**super().target(), **said, "boost": self.boost}

    @property
    def _word_maps(self) -> WordMaps | None:
        return self.__dict__.get("_maps")

    def put_on(self, state: ForwardState, denoiser: nn.Module, handles: list[Any]) -> Callable[[], str | None] | None:
        maps = self._word_maps
        if maps is None:
            return None
        maps.put_on(state, handles)
        return maps.report

    @property
    def follows_runs(self) -> bool:
        return self._word_maps is not None

    def refuses_call(self, layout: Layout) -> str | None:
        maps = self._word_maps
        if maps is not None and maps.short is not None:
            return maps.short
        if maps is None and self.words is not None and layout.grid.text <= int(self.words[1]):
            return (
                f"words {self.words} are text tokens of the sequence, which has {layout.grid.text}, and there is no "
                "cross-attention to text; give mask"
            )
        return super().refuses_call(layout)

    def refuses_window(self) -> str | None:
        return "its place is one of a whole clip, and not of a KV cache"

    def refuses_some_heads(self) -> str | None:
        if self.words is not None:
            return "words are looked for by all heads, and each rank has some; give mask"
        return super().refuses_some_heads()

    def refuses_some_samples(self) -> str | None:
        if self._word_maps is not None:
            return "words are read from the samples of the prompt, which half of the processes have; give mask"
        return super().refuses_some_samples()

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        means = mean_map(layout, query, key, scale, key_layout)
        if self.words is None:
            return means.draft()
        if (maps := self._word_maps) is not None:
            tokens = maps.of(layout.grid.tokens, query.shape[0])
            return means.draft(None if tokens is None else of_blocks(layout, tokens))
        grid, first, last = layout.grid, int(self.words[0]), int(self.words[1])
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
            if c.scores.ndim != 2:  # nothing was read yet: all rows alike
                return select("rows", c.ranked, c.always, c.key_rows, density=c.density_of_rows(self.density))
            video = int((~c.layout.is_text).sum())
            count = max(1, round(self.share * video))
            seen = c.scores.masked_fill(text, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            place, part = seen < count, count / video
        inside, outside = densities(c.density_of_rows(self.density), part, self.boost)
        many, few = (
            select("rows", c.ranked, c.always, c.key_rows, density=density) for density in (inside, max(outside, 1e-6))
        )
        return torch.where(place[:, None, :, None], many, few)


def of_blocks(layout: Layout, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N): the mean of each block, of (B, S) in the model's order of tokens."""
    sums = tokens.new_zeros(len(tokens), layout.blocks)
    block = layout.cached(("block of token", tokens.device), lambda: _block_of_token(layout).to(tokens.device))
    return sums.index_add_(1, block, tokens) / layout.block_table(tokens.device)[1]


def _block_of_token(layout: Layout) -> torch.Tensor:
    """(S,) int64, in the model's order of tokens."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(layout.blocks), layout.block_rows)[layout.inverse]


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


def _words(given: Any) -> tuple[int, int] | tuple[str, ...]:
    listed = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if listed and all(isinstance(word, str) and word.strip() for word in listed):
        return tuple(word.strip() for word in listed)
    numbers = len(listed) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in listed)
    if not numbers or not 0 <= listed[0] <= listed[1]:
        raise ConfigError(
            "foreground: words must be words of the prompt, such as 'circle', or the first and the last of the text tokens, such "
            f"as (3, 4), got {given!r}"
        )
    return (listed[0], listed[1])
