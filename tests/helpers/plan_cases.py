"""Plans to test kernels with, and an independent, slow answer to what each should compute."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, plan_from_block_map
from tilewise.kernels.plans.layout import Grid, Layout, cached_layout
from tilewise.kernels.plans.window import window_plan

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    name: str
    grid: Grid
    tile: Triple
    windows: tuple[Triple, ...]
    unit: Literal["tile", "token"] = "tile"
    stride: Triple = (1, 1, 1)
    head_set: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    batch: int = 1
    block: int = 32

    def layout(self) -> Layout:
        return cached_layout(self.grid, self.tile, self.block)

    def plan(self, device: str = "cpu") -> BlockPlan:
        head_set = None if self.head_set is None else torch.tensor(self.head_set)
        return window_plan(
            self.layout(), self.windows, unit=self.unit, stride=self.stride, head_set=head_set, device=device
        )

    def tensors(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [
            torch.randn(self.batch, self.grid.tokens, h, self.head_dim, generator=generator).to(device, dtype)
            for h in heads
        ]

    def window_of_head(self, head: int) -> Triple:
        if self.head_set is not None:
            return self.windows[self.head_set[head]]
        return self.windows[head if len(self.windows) > 1 else 0]


CASES = [
    Case("one token", Grid(1, 1, 1), (3, 3, 3), ((1, 1, 1),)),
    Case("one row", Grid(1, 1, 37), (1, 1, 5), ((1, 1, 3),)),
    Case("one frame", Grid(1, 9, 13), (1, 4, 4), ((1, 3, 3),), head_dim=64),
    Case("divisible", Grid(4, 8, 8), (2, 4, 4), ((1, 2, 2),), batch=2),
    Case("ragged, even window", Grid(5, 7, 9), (2, 4, 4), ((2, 1, 2),), head_dim=16),
    Case("ragged, odd window", Grid(7, 10, 6), (2, 3, 4), ((3, 3, 1),)),
    Case("tile of several blocks", Grid(3, 9, 10), (3, 5, 5), ((1, 1, 1),)),
    Case("a window a head", Grid(4, 6, 5), (2, 2, 3), ((1, 3, 3), (2, 1, 1), (9, 9, 9)), heads=3, kv_heads=3),
    Case(
        "heads share windows", Grid(4, 6, 5), (2, 2, 3), ((1, 3, 3), (2, 1, 2)), head_set=(1, 0, 1), heads=3, kv_heads=1
    ),
    Case("grouped queries", Grid(3, 5, 8), (2, 3, 4), ((1, 1, 2),), heads=6, kv_heads=2, batch=2),
    Case("text last", Grid(3, 6, 6, text=41), (2, 3, 3), ((1, 1, 1),)),
    Case("text first", Grid(3, 6, 6, text=7, text_first=True), (2, 3, 3), ((2, 1, 1),), head_dim=96),
    Case("token window", Grid(3, 9, 10), (3, 3, 3), ((3, 5, 4),), unit="token"),
    Case("token window, text", Grid(2, 9, 10, text=20), (2, 3, 4), ((2, 3, 5), (1, 7, 2)), unit="token", batch=2),
    Case("token window, stride", Grid(4, 9, 10), (2, 3, 5), ((3, 5, 4),), unit="token", stride=(2, 3, 2)),
    Case("full window", Grid(3, 5, 6), (2, 2, 3), ((9, 9, 9),), head_dim=128),
]
CASE_IDS = [case.name for case in CASES]


@cache
def naive_mask(case: Case) -> torch.Tensor:
    """(heads, S, S) bool over raster tokens, by the window formula as the papers write it: one pair at a time, in Python."""
    grid, tiles = case.grid, case.layout().tiles
    tokens: list[Triple | None] = [(t, h, w) for t in range(grid.t) for h in range(grid.h) for w in range(grid.w)]
    text: list[Triple | None] = [None] * grid.text
    tokens = text + tokens if grid.text_first else tokens + text
    lengths = tiles if case.unit == "tile" else grid.shape

    def unit(token: Triple) -> Triple:
        if case.unit == "token":
            return token
        tile = case.tile
        return (token[0] // tile[0], token[1] // tile[1], token[2] // tile[2])

    def sees(i: int, j: int, length: int, window: int, stride: int) -> bool:
        window = min(window, length)
        leader = min((i // stride) * stride + stride // 2, length - 1)
        start = min(max(leader - window // 2, 0), length - window)
        return start <= j < start + window

    def mask(window: Triple) -> torch.Tensor:
        visible = [
            [[sees(i, j, n, window[axis], case.stride[axis]) for j in range(n)] for i in range(n)]
            for axis, n in enumerate(lengths)
        ]

        def pair(q: Triple | None, k: Triple | None) -> bool:
            return q is None or k is None or all(visible[axis][q[axis]][k[axis]] for axis in range(3))

        units = [None if token is None else unit(token) for token in tokens]
        return torch.tensor([[pair(query, key) for key in units] for query in units])

    windows = [case.window_of_head(head) for head in range(case.heads)]
    masks = {window: mask(window) for window in set(windows)}
    return torch.stack([masks[window] for window in windows])


def layout_mask(case: Case) -> torch.Tensor:
    """``naive_mask`` with both token axes in layout order."""
    order = case.layout().permutation
    return naive_mask(case)[:, order][:, :, order]


@dataclass(frozen=True)
class TwoLayouts:
    """Random block maps between the queries of one layout and the keys of another, and what they show, pair by pair."""

    queries: Layout
    keys: Layout
    full: torch.Tensor
    partial: torch.Tensor | None
    intervals: torch.Tensor | None
    head_set: torch.Tensor | None
    heads: int

    def plan(self) -> BlockPlan:
        return plan_from_block_map(
            self.queries,
            self.full,
            self.partial,
            key_layout=self.keys,
            intervals=self.intervals,
            head_set=self.head_set,
        )

    def mask(self) -> torch.Tensor:
        """(P, heads, Sq, Sk) bool."""
        q_block = torch.arange(self.queries.blocks).repeat_interleave(self.queries.block_rows)
        k_block = torch.arange(self.keys.blocks).repeat_interleave(self.keys.block_rows)
        mask = self.full[:, :, q_block][..., k_block]
        if self.partial is not None and self.intervals is not None:
            lo, hi, at = (
                self.intervals[:, 0::2, :, None],
                self.intervals[:, 1::2, :, None],
                self.keys.coords[None, :, None],
            )
            inside = ((at >= lo) & (at < hi)).all(1)
            mask = mask | (self.partial[:, :, q_block][..., k_block] & inside)
        mask = mask | self.queries.is_text[q_block][:, None] | self.keys.is_text[k_block]
        sets = torch.arange(self.heads) if self.head_set is None else self.head_set
        return mask[:, sets if self.full.shape[1] > 1 else torch.zeros(self.heads, dtype=torch.long)]


def two_layouts(seed: int, block: int = 32) -> TwoLayouts:
    """Ragged tiles, text on either side or none, lists of samples and heads; every third without partial blocks."""
    choose = random.Random(seed)

    def layout() -> Layout:
        grid = Grid(*(choose.randint(1, n) for n in (4, 7, 7)), choose.choice([0, 0, 5, 21]), choose.random() < 0.5)
        return Layout(
            grid, (choose.randint(1, 3), choose.randint(1, 4), choose.randint(1, 4)), choose.choice([16, block])
        )

    queries, keys = layout(), layout()
    samples, sets = choose.choice([1, 1, 2]), choose.choice([1, 2, 3])
    heads = choose.choice([sets, 3]) if sets > 1 else 2
    head_set = torch.tensor([choose.randrange(sets) for _ in range(heads)]) if sets > 1 and heads != sets else None
    generator = torch.Generator().manual_seed(seed)
    shown = torch.rand(samples, sets, queries.blocks, keys.blocks, generator=generator)
    if seed % 3 == 0:
        return TwoLayouts(queries, keys, shown < 0.4, None, None, head_set, heads)
    sizes = torch.tensor(keys.grid.shape).view(1, 3, 1)
    ends = torch.rand(sets, 2, 3, queries.grid.tokens, generator=generator)
    lo, hi = (ends[:, 0] * sizes).long() - 1, (ends[:, 1] * (sizes + 3)).long()
    intervals = torch.stack([lo, hi], 2).flatten(1, 2)
    partial = ((shown > 0.25) & (shown < 0.7)) & ~queries.is_text[:, None] & ~keys.is_text
    return TwoLayouts(queries, keys, shown < 0.25, partial, intervals, head_set, heads)


@dataclass(frozen=True)
class ChunkCase:
    """The last frames of a grid against all of it, by layouts with room for 128 rows: what streaming asks for."""

    name: str
    frames: int
    queries: Grid
    q_tile: Triple
    tile: Triple
    windows: tuple[Triple, ...]
    unit: Literal["tile", "token"] = "token"
    key_text: int = 0
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    head_dim: int = 64

    @property
    def keys(self) -> Layout:
        return Layout(Grid(self.frames, self.queries.h, self.queries.w, self.key_text), self.tile)

    def plan(self, device: str = "cpu") -> BlockPlan:
        offset = (self.frames - self.queries.t, 0, 0)
        return window_plan(
            Layout(self.queries, self.q_tile), self.windows, unit=self.unit, key_layout=self.keys, query_offset=offset,
            device=device,
        )  # fmt: skip

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        sizes = (self.queries.tokens, self.heads), *((self.keys.grid.tokens, self.kv_heads),) * 2
        return [torch.randn(self.batch, *size, self.head_dim, generator=generator).to(device, dtype) for size in sizes]


CHUNKS = [
    ChunkCase("partial", 9, Grid(3, 10, 16), (3, 5, 8), (3, 5, 8), ((5, 7, 5),)),
    ChunkCase("partial, text", 9, Grid(3, 10, 16, 110), (3, 5, 8), (3, 10, 4), ((4, 7, 5), (2, 3, 9)), key_text=101),
    ChunkCase("tiles, grouped", 8, Grid(2, 10, 12), (2, 5, 12), (2, 5, 12), ((2, 1, 1),), "tile", heads=4, batch=2),
    ChunkCase("aligned", 8, Grid(2, 16, 8), (2, 8, 8), (2, 8, 8), ((2, 1, 1),), "tile", key_text=128),
    ChunkCase("one frame, its text", 6, Grid(1, 16, 8, 5), (1, 16, 8), (2, 8, 8), ((3, 9, 8),), batch=2),
]
CHUNK_IDS = [case.name for case in CHUNKS]
