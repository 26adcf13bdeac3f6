"""Where the tokens are: the token grid of a model input, and an order of them in which every tile is contiguous.

    Grid(t=3, h=4, w=4)          48 tokens in raster order, t slowest and w fastest
    Layout(grid, tile=(3, 2, 2)) the same 48 tokens as 4 runs of 12: one run a tile

Border tiles keep the size that is left over (they are *ragged*): a layout holds exactly the grid's tokens and no padding,
so any T, H, W ≥ 1 works with any tile. A tile of more than ``MAX_BLOCK_ROWS`` tokens is cut into several blocks; blocks are
the unit that kernels and plans speak of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

MAX_BLOCK_ROWS = 128
MAX_CACHED = 64  # values that a layout keeps, and as many layouts of other text lengths

T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """The tokens of one sample: ``t × h × w`` video (or image) tokens, and ``text`` tokens of the same sequence.

    Args:
        t, h, w: latent frames, rows and columns after patchify. Each ≥ 1.
        text: number of text tokens that share the self-attention sequence (0 where text has its own cross-attention).
        text_first: whether the text tokens stand before the video tokens.
        opposite: how many of the text tokens stand on the other side of the video in the model's sequence: reference images
            after an image, a history before a video. A layout brings them to the rest of the text.
    """

    t: int
    h: int
    w: int
    text: int = 0
    text_first: bool = False
    opposite: int = 0

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1 or self.text < 0:
            raise ValueError(f"Grid: t, h and w must be at least 1 and text at least 0, got {self}")
        if not 0 <= self.opposite <= self.text:
            raise ValueError(f"Grid: opposite must be at most the {self.text} text tokens, got {self.opposite}")

    def with_text(self, text: int) -> Grid:
        """The same grid with another number of text tokens."""
        return replace(self, text=text, opposite=min(self.opposite, text))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.t, self.h, self.w)

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.t * self.h * self.w

    @property
    def tokens(self) -> int:
        """Sequence length S: video and text tokens together."""
        return self.video + self.text

    @property
    def video_start(self) -> int:
        """Position of the first video token in the model's sequence."""
        return self.text - self.opposite if self.text_first else self.opposite

    def __str__(self) -> str:
        text = f" + {self.text} text" if self.text else ""
        return f"{self.t}×{self.h}×{self.w}{text}"


def tile_counts(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Number of tiles along each axis, the ragged one at the end included."""
    return tuple(math.ceil(length / size) for length, size in zip(shape, tile, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Layout:
    """A token order in which each tile of the grid is contiguous, and the table of its blocks.

    Args:
        grid: the tokens.
        tile: tile size in tokens along (t, h, w). Clipped to the grid.
        max_block_rows: a tile with more tokens is cut into blocks of at most this many consecutive rows.

    Tile order is raster (t slowest), and so is the order of tokens within a tile. Text tokens are cut into blocks of
    their own, all before or all after the tiles (``grid.text_first``), in the order of the model's sequence.
    """

    grid: Grid
    tile: tuple[int, int, int]
    max_block_rows: int = MAX_BLOCK_ROWS

    def __post_init__(self) -> None:
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"Layout: tile must be three sizes of at least 1 token (t, h, w), got {self.tile}")
        if self.max_block_rows not in (16, 32, 64, 128):
            raise ValueError(f"Layout: max_block_rows must be 16, 32, 64 or 128, got {self.max_block_rows}")
        clipped = tuple(min(size, length) for size, length in zip(self.tile, self.grid.shape, strict=True))
        object.__setattr__(self, "tile", clipped)

    def with_text(self, text: int) -> Layout:
        """The same layout for another number of text tokens: same class, same fields but for ``grid.text``.

        The same object each time, kept with this layout, so that its tables are computed once.

        Raises:
            ValueError: for a negative number.
        """
        if text == self.grid.text:
            return self
        # replace() calls the constructor of the layout's own class, so that subclasses keep their order and fields.
        return _kept(self._of_text, text, lambda: replace(self, grid=self.grid.with_text(text)))

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key: tables on a device, plans and the like, derived from this layout.

        They are kept with the layout, so that they are freed with it: no module holds memory of a device. The oldest of more
        than 64 is forgotten.
        """
        return _kept(self._derived, key, make)

    @cached_property
    def _of_text(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        return {}

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Number of tiles along (t, h, w)."""
        return tile_counts(self.grid.shape, self.tile)

    @cached_property
    def _tile_of_token(self) -> torch.Tensor:
        """(3, video) int64: tile coordinates of each video token in raster order."""
        return self.raster_coords // torch.tensor(self.tile, device="cpu").view(3, 1)

    @cached_property
    def raster_coords(self) -> torch.Tensor:
        """(3, video) int64: (t, h, w) of each video token in raster order."""
        axes = [torch.arange(length, device="cpu") for length in self.grid.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)

    @cached_property
    def permutation(self) -> torch.Tensor:
        """(S,) int64: position in the model's sequence of the token at each layout position; ``x[:, layout.permutation]``
        reorders."""
        return self._beside_text(self._video_order)

    @cached_property
    def _video_order(self) -> torch.Tensor:
        """(video,) int64: raster position of the video token at each place among the tiles."""
        tile = self._tile_of_token
        _, nh, nw = self.tiles
        tile_id = (tile[0] * nh + tile[1]) * nw + tile[2]
        return torch.argsort(tile_id, stable=True)

    def _beside_text(self, video: torch.Tensor) -> torch.Tensor:
        """(S,) int64: the order ``video`` of the video tokens, and the text tokens before or after them."""
        start, end = self.grid.video_start, self.grid.video_start + self.grid.video
        text = [torch.arange(start, device="cpu"), torch.arange(end, self.grid.tokens, device="cpu")]
        return torch.cat([*text, video + start] if self.grid.text_first else [video + start, *text])

    @cached_property
    def inverse(self) -> torch.Tensor:
        """(S,) int64: layout position of each token of the model's sequence; undoes ``permutation``."""
        inverse = torch.empty_like(self.permutation)
        inverse[self.permutation] = torch.arange(self.grid.tokens, device="cpu")
        return inverse

    @cached_property
    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block starts, block rows (layout positions) and tile id, −1 for text; each (N,) int64 in sequence order."""
        per_axis = []
        for length, size in zip(self.grid.shape, self.tile, strict=True):
            count = math.ceil(length / size)
            sizes = torch.full((count,), size, device="cpu")
            sizes[-1] = length - size * (count - 1)
            per_axis.append(sizes)
        rows = torch.einsum("t,h,w->thw", *per_axis).reshape(-1)
        rows, tile_id = _cut(rows, torch.arange(len(rows), device="cpu"), self.max_block_rows)
        if self.grid.text:
            text_rows, text_id = _cut(
                torch.tensor([self.grid.text], device="cpu"), torch.tensor([-1], device="cpu"), self.max_block_rows
            )
            first, last = (text_rows, rows) if self.grid.text_first else (rows, text_rows)
            first_id, last_id = (text_id, tile_id) if self.grid.text_first else (tile_id, text_id)
            rows, tile_id = torch.cat([first, last]), torch.cat([first_id, last_id])
        return torch.cumsum(rows, 0) - rows, rows, tile_id

    @property
    def block_start(self) -> torch.Tensor:
        """(N,) int64: layout position of each block's first row."""
        return self._blocks[0]

    @property
    def block_rows(self) -> torch.Tensor:
        """(N,) int64: rows of each block, 1 … max_block_rows."""
        return self._blocks[1]

    @property
    def is_text(self) -> torch.Tensor:
        """(N,) bool: whether a block holds text tokens."""
        return self._blocks[2] < 0

    @cached_property
    def block_tile(self) -> torch.Tensor:
        """(N, 3) int64: tile coordinates of each block; −1 for text blocks."""
        _, nh, nw = self.tiles
        tile_id = self._blocks[2]
        coords = torch.stack([tile_id // (nh * nw), tile_id // nw % nh, tile_id % nw], dim=1)
        return torch.where(self.is_text[:, None], torch.full_like(coords, -1), coords)

    @cached_property
    def coords(self) -> torch.Tensor:
        """(3, S) int64: (t, h, w) of the token at each layout position; −1 for text tokens."""
        coords = torch.full((3, self.grid.tokens), -1, device="cpu")
        start = self.grid.text if self.grid.text_first else 0
        coords[:, start : start + self.grid.video] = self.raster_coords[:, self._video_order]
        return coords

    @property
    def blocks(self) -> int:
        """Number of blocks, text included."""
        return len(self.block_rows)

    @cached_property
    def room(self) -> int:
        """Rows of room that a kernel gives each block: a power of two, at least 16."""
        return max(16, 1 << (int(self.block_rows.max()) - 1).bit_length())

    @property
    def fill(self) -> float:
        """Rows held ÷ rows that the blocks have room for, in (0, 1]: what ragged blocks waste in a kernel."""
        return self.grid.tokens / (self.blocks * self.room)

    def block_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(start (N,) int32, rows (N,) int32, is_text (N,) bool) of the blocks on a device; not to be written to."""

        def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            with torch.inference_mode(False):
                start, rows = self.block_start.to(device, torch.int32), self.block_rows.to(device, torch.int32)
                return start, rows, self.is_text.to(device)

        return self.cached(("block table", device), make)


def _cut(rows: torch.Tensor, ids: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each run of ``rows`` tokens into pieces of ``limit``, the remainder last; ids are repeated along."""
    pieces = (rows + limit - 1) // limit
    out = torch.full((int(pieces.sum()),), limit, device="cpu")
    out[torch.cumsum(pieces, 0) - 1] = rows - limit * (pieces - 1)
    return out, ids.repeat_interleave(pieces)


def _kept(kept: dict[Any, Any], key: Hashable, make: Callable[[], T]) -> T:
    found = kept.get(key)
    if found is None:
        for oldest in list(kept)[: max(0, len(kept) + 1 - MAX_CACHED)]:
            kept.pop(oldest, None)
        found = kept[key] = make()
    return found


_IN_USE: WeakValueDictionary[tuple[Any, ...], Layout] = WeakValueDictionary()


def cached_layout(grid: Grid, tile: tuple[int, int, int], max_block_rows: int = MAX_BLOCK_ROWS) -> Layout:
    """The same ``Layout`` object for the same arguments as long as somebody holds it, so that its tables are computed once."""
    key = (grid, tile, max_block_rows)
    found = _IN_USE.get(key)
    if found is None:
        found = _IN_USE[key] = Layout(grid, tile, max_block_rows)
    return found
