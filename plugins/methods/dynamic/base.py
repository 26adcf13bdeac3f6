"""What all methods that look before they choose share: a map of expected attention mass goes in, a plan comes out.

    map of blocks  →  rank  →  select  →  lists of key blocks  (+ summary rows of what is skipped)
    (the method's)    by mass or    by density or recall;
                      by error      guarantees, floor, window

A method on top of this is one file that gives ``draft``: the logits of its map. Everything runs on the device of the queries
and nothing waits for it.

Queries and keys are the same tokens; or the keys are those of the window of a KV cache, of which the queries' chunk is a part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.dynamic_plan import dynamic_plan
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout, cached_layout, tile_counts
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.kernels.selection.block_scores import error_logits, summary_bias
from tilewise.kernels.selection.block_stats import BlockStats, block_stats
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import BlockCompensation, DynamicMethod, Method, Planned, with_tile
from tilewise.plugins.methods.dynamic.always_keep import always_kept
from tilewise.plugins.methods.dynamic.block_logits import score_variance
from tilewise.plugins.methods.dynamic.options import DEFAULT_TILE, Triple, checked
from tilewise.plugins.methods.dynamic.recall_probe import exact_recall, probe_rows
from tilewise.plugins.methods.dynamic.reuse import Drift
from tilewise.plugins.methods.dynamic.selection import broken_rows, select
from tilewise.plugins.methods.dynamic.windowed_selection import Bounds, bounds_of, plan_within

MAX_BLOCKS = 8192  # 1,048,576 tokens in whole blocks. Maps are heads × N × N: at 12 heads and as many, 3.2 GB each
FEWEST_BLOCKS = 64  # a smaller map leaves little to choose from: the tile is halved until there are so many
SMALLEST_TILE = 16  # tokens: the least that a kernel's block is used for
# Tokens below which a call stays dense, as planning and its launches would cost more than sparse attention saves: on a CPU as
# tried on the demo model; on a GPU where a quarter density breaks even with cuDNN at 24 heads × 128, an H100 (0.76 × at 10,800
# tokens, 1.75 × at 18,000: benchmarks/dynamic.py). What it costs there is the host's time for the launches, about 2 ms a call.
MIN_TOKENS = {"cuda": 12_800, "cpu": 1024}


@dataclass(frozen=True)
class DraftMap:
    """What a method expects, before anything is chosen.

    Attributes:
        logits: (B, H, Nq, Nk) float32, log of the attention mass of query block i in key block j, up to a constant of the row.
        keys: means and variances of the key blocks, if the method made both.
        s2: (B, H, Nq, Nk) float32, the variance of scores within a key block, if the method knows it.
    """

    logits: torch.Tensor
    keys: BlockStats | None = None
    s2: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockSelectionMethod(DynamicMethod):
    """Options that such methods share.

    Args:
        density: fraction of token pairs to keep, in (0, 1], text included. Default 0.25 if nothing else is given. Over the
            window of a KV cache: of queries and all keys of the window; memory and sink are kept and count.
        head_density: instead: one density for each head of the layer; with select="rows".
        recall: instead: fraction of the attention mass to keep, in (0, 1], as the draft estimates it.
        safety: with ``recall``: by how much the draft may underestimate what is lost, ≥ 1; it aims at losing (1 − recall) ÷
            safety. With the default, 3, at least 95 % of the query blocks of the demo model reach a recall of 0.8, 0.9 or 0.95
            that is asked of ``draft``; with 1, their mean does.
        tile: tokens of a block (t, h, w), at most 128. Default (1, 8, 16); without text in the sequence, halved until the grid
            has 64 of them.
        select: how pairs are chosen: "rows", "head", "topk" or "shared"; see ``selection.py``. "topk" needs a density.
        rank: what counts as best at a density: "mass", or "error", the error that skipping makes where compensation follows.
            Default: "error" if ``compensate``, else "mass". By a recall it is always mass.
        compensate: put one summary row in the place of each block that is skipped (block_compensation.py). Default: on. On the
            bundled demo model it divides the error of attention by 1.5 to 2.6 (benchmarks/attention_error.py).
        floor: fewest blocks of a row, ≥ 1.
        cap: most blocks of a row, for "rows"; None: no limit.
        always: pairs kept in any case: names of "self", "neighbours", "first-frame".
        within: a static method (or its dictionary) whose windows bound where a block may look: ``STA``, ``Inward``, …. A window
            in tiles counts this method's. Where the chosen blocks would show a query nothing of its window, the blocks nearest
            to it are kept too, beyond the target.
        refresh: denoising steps that a choice is kept for; 1: chosen anew at each call.
        drift: with ``refresh`` > 1: how much estimated recall may fall before the choice is made anew at the next step, in
            [0, 1]; None: not tested.
        probe: queries a call whose recall is measured exactly, for ``summary``; 0: none.
        min_tokens: calls with fewer keys stay dense, counted as "short". Default: where sparse attention begins to pay on the
            device: 12,800 on a GPU, 1024 on a CPU.

    Raises:
        ConfigError: for values outside those ranges, or more than one of density, head_density and recall.
    """

    density: float | None = None
    head_density: tuple[float, ...] | None = None
    recall: float | None = None
    safety: float = 3.0
    tile: Triple | None = None
    select: str = "rows"
    rank: str | None = None
    compensate: bool | None = None
    floor: int = 1
    cap: int | None = None
    always: tuple[str, ...] = ("self",)
    within: Any = None
    refresh: int = 1
    drift: float | None = 0.02
    probe: int = 0
    min_tokens: int | None = None

    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (("density", "head_density", "recall"),)

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)

    # ── before anything runs ─────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with its window's method prepared."""
        return self if self.within is None else dataclasses.replace(self, within=self.within.prepare(target, denoiser))

    def check(self, heads: int) -> None:
        if self.head_density is not None and len(self.head_density) != heads:
            raise ConfigError(
                f"{self.name}: head_density has {len(self.head_density)} densities, but the layer has {heads} heads"
            )
        if self.within is not None:
            self.within.check(heads)

    def head_costs(self) -> tuple[float, ...] | None:
        return self.head_density if self.within is None else None

    def of_heads(self, heads: Sequence[int]) -> Self:
        densities = None if self.head_density is None else tuple(self.head_density[head] for head in heads)
        within = None if self.within is None else self.within.of_heads(heads)
        return dataclasses.replace(self, head_density=densities, within=within)

    def refuses_some_heads(self) -> str | None:
        if self.select == "shared":
            return "select='shared' chooses among the pairs of all heads, and each rank has some; give another select"
        if self.refresh > 1 and self.drift is not None:
            return "drift goes by the recall of all heads, and each rank has some; give drift=None, or refresh=1"
        return None if self.within is None else self.within.refuses_some_heads()

    def layout(self, grid: Grid) -> Layout:
        # Text in the sequence is cut at 128 rows, and a kernel's block has room for as many: smaller tiles would leave it empty.
        usual = DEFAULT_TILE if grid.text >= SMALLEST_TILE else default_tile(grid.shape)
        return cached_layout(grid, self.tile or usual)

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        return None if self.within is None else self.within.scale(layout, head_dim)

    def describe(self, layout: Layout) -> dict[str, Any]:
        name = next(name for name in self.exclusive[0] if getattr(self, name) is not None)
        target = {name: getattr(self, name)}
        more = {"within": self.within.to_dict()} if self.within is not None else {}
        return {**target, "select": self.select, "compensate": self.compensates, **more}

    def to_dict(self) -> dict[str, Any]:
        within = None if self.within is None else self.within.to_dict()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **fields, "within": within}

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        if self.recall is not None:
            return math.nan
        device = torch.device("cpu")
        bounds = self._bounds(layout, heads, device, window)
        wanted = self.density if self.head_density is None else math.fsum(self.head_density) / len(self.head_density)
        assert wanted is not None
        found = wanted if bounds is None else min(wanted, bounds.plan.density)
        if window is None:
            return found
        rows = [table.block_table(device)[1].double() for table in (layout, window.layout)]
        always = always_kept(layout, self.always, device, window).double()
        least = rows[0] @ always @ rows[1] / (rows[0].sum() * rows[1].sum())
        return max(found, float(least))  # memory and sink are kept whatever the density

    def expected_cost(self, layout: Layout, heads: int) -> float:
        density = self.expected_density(layout, heads)
        return density + (1 - density) * layout.blocks / layout.grid.tokens if self.compensates else density

    def refuses_call(self, layout: Layout) -> str | None:
        if layout.blocks <= MAX_BLOCKS:
            return None
        room = math.prod(layout.tile) < MAX_BLOCK_ROWS  # a tile is one block of a kernel, and has at most as many rows
        try_this = (
            f"give a tile of up to {MAX_BLOCK_ROWS} tokens, or make a smaller clip" if room else "make a smaller clip"
        )
        return f"tile {layout.tile} cuts {layout.grid} into {layout.blocks} blocks, more than {MAX_BLOCKS}; {try_this}"

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        least = MIN_TOKENS.get(device.type, 0) if self.min_tokens is None else self.min_tokens
        return None if tokens >= least else f"{tokens} tokens, {self.name} pays from {least} on"

    def refuses_window(self) -> str | None:
        if self.refresh == 1:
            return None
        return f"refresh={self.refresh} keeps a choice for {self.refresh} steps, and every pass of a chunk chooses anew"

    @property
    def depends_on_time(self) -> bool:
        return self.within is not None or not {"neighbours", "first-frame"}.isdisjoint(self.always)

    @property
    def compensates(self) -> bool:
        return self.compensate is not False

    @property
    def keeps_memory(self) -> bool:
        return self.refresh > 1

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        """The method's map of a call: query (B, Sq, H, D) and key (B, Sk, Hk, D).

        layout: the blocks of the queries. key_layout: those of the keys; None: the same.
        """
        raise NotImplementedError

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        heads = query.shape[2]
        keys = layout if window is None else window.layout
        _, rows, text = layout.block_table(query.device)
        _, key_rows, key_text = keys.block_table(query.device)
        bounds = self._bounds(layout, heads, query.device, window)
        drafted = self.draft(layout, query, key, scale, keys)
        logits = drafted.logits
        if bounds is not None:
            logits = logits.masked_fill(~bounds.seen_by_head(heads), -math.inf)
        share = logits.softmax(-1)
        blocks = self._block_stats(layout, keys, drafted, query, key, value, scale)
        ranked = logits
        if blocks is not None and blocks.values.variance is not None:
            ranked = error_logits(logits, blocks.s2, blocks.values.variance.sum(-1).transpose(1, 2))
        broken = broken_rows(ranked)

        target = None if self.recall is None else 1 - (1 - self.recall) / self.safety

        def choose() -> torch.Tensor:
            if self.density == 1 or self.recall == 1:  # exactly: a rule may stop a rounding error short of it
                return torch.ones_like(logits, dtype=torch.bool)
            wanted = always_kept(layout, self.always, query.device, window)
            always = wanted if bounds is None else wanted & bounds.seen_by_all()
            kept = select(
                self.select, ranked, always, key_rows, density=self._density_of_rows(layout, query.device), recall=target,
                floor=self.floor, cap=self.cap, query_rows=rows,
            )  # fmt: skip
            if bounds is not None:  # those within the window of some heads alone
                kept = kept | (wanted & bounds.seen_by_head(heads))
            kept = kept | text[:, None] | key_text[None, :]
            return kept if bounds is None else bounds.with_a_key(kept)

        def recall_of(kept: torch.Tensor) -> torch.Tensor:
            """() estimated recall, queries counted by token; a broken row keeps everything."""
            mass = (share * kept).sum(-1).masked_fill(broken, 1.0)
            return (mass * rows).sum(-1).mean() / layout.grid.tokens

        if self.keeps_memory and not capturing(query.device):
            kept, recall = Drift(self.refresh, self.drift).reuse(memory, tick, choose, recall_of)
            kept = kept | broken[..., None]
        else:
            kept = choose()
            recall = recall_of(kept)
        plan = dynamic_plan(layout, kept, key_layout=keys) if bounds is None else plan_within(bounds, kept)
        if bounds is not None:
            kept = kept & bounds.seen_by_head(heads)
        skipped = None
        if blocks is not None and self.compensates:
            seen = kept if bounds is None else kept | self._hidden(bounds, heads)
            skipped = BlockCompensation(blocks.keys.mean, blocks.values.mean, summary_bias(blocks.s2, key_rows, seen))
        probe = None
        if self.probe:
            at = probe_rows(query.shape[1], self.probe, query.device)
            probe = exact_recall(query, key, kept, (rows, key_rows), scale, at, bounds).mean()
        return Planned(plan, skipped, share, recall, probe, broken.sum(dtype=torch.float32))

    def _density_of_rows(self, layout: Layout, device: torch.device) -> float | torch.Tensor | None:
        """What the rows of the map are to keep: a density, or one for each head, (H,) float32; None: there is a recall."""
        if self.select in ("head", "shared"):
            return self.density
        heads = self.head_density
        if heads is None:
            return _row_density(self.density, layout)

        def make() -> torch.Tensor:
            with torch.inference_mode(False):
                return torch.tensor([_row_density(density, layout) for density in heads], device=device)

        return layout.cached(("head density", heads, device), make)

    def _hidden(self, bounds: Bounds, heads: int) -> torch.Tensor:
        """(1, H or 1, Nq, Nk) bool: blocks that no mean stands for. What is outside the window is not skipped but invisible,
        unless the window has a far field; and the mean of a block partly outside would show what is."""
        whole = bounds.whole_by_head(heads)
        return ~whole if getattr(self.within, "far", None) is None else bounds.seen_by_head(heads) & ~whole

    def _bounds(
        self, layout: Layout, heads: int, device: torch.device, window: WindowKeys | None = None
    ) -> Bounds | None:
        return None if self.within is None else _window_bounds(self.within, layout, heads, device, window)

    @property
    def ranks_by_error(self) -> bool:
        """Whether skipped pairs are ranked by the error that they would make."""
        return self.recall is None and (self.compensates if self.rank is None else self.rank == "error")

    def _block_stats(
        self,
        layout: Layout,
        key_layout: Layout,
        drafted: DraftMap,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> _Blocks | None:
        """What ranking by error and compensation go by; what the method's map has not, is made here. None: not needed."""
        if not (self.compensates or self.ranks_by_error):
            return None
        start, rows, _ = key_layout.block_table(query.device)
        keys = drafted.keys or block_stats(key, start, rows, variance=True)
        s2 = drafted.s2
        if s2 is None:
            assert keys.variance is not None
            query_start, query_rows, _ = layout.block_table(query.device)
            s2 = score_variance(block_stats(query, query_start, query_rows).mean, keys.variance, scale)
        return _Blocks(keys, block_stats(value, start, rows, variance=self.ranks_by_error), s2)


@dataclass(frozen=True)
class _Blocks:
    """Statistics of key and value blocks, and the variance of scores (B, H, Nq, Nk). values.variance: None where it is not
    ranked by error."""

    keys: BlockStats
    values: BlockStats
    s2: torch.Tensor


def default_tile(shape: Triple) -> Triple:
    """(1, 8, 16), halved on its longer side until the grid has 64 tiles or a tile 16 tokens."""
    t, h, w = DEFAULT_TILE
    while math.prod(tile_counts(shape, (t, h, w))) < FEWEST_BLOCKS and h * w > SMALLEST_TILE:
        h, w = (h, w // 2) if w > h else (h // 2, w)
    return (t, h, w)


def _window_bounds(within: Method, layout: Layout, heads: int, device: torch.device, keys: WindowKeys | None) -> Bounds:
    """The window over this layout, kept with it: one that counts tiles counts the layout's. keys: of a KV cache."""
    within = with_tile(within, layout.tile)

    def make() -> Bounds:
        with torch.inference_mode(False):
            if keys is None:
                return bounds_of(within.plan(layout, heads, device))
            return bounds_of(keys.plan(within.plan(keys.layout, heads, device)))

    cached = layout.cached if keys is None else keys.cached
    return cached(("window bounds", within, heads, device), make)


def _row_density(density: float | None, layout: Layout) -> float | None:
    """What video rows must keep for the whole to keep ``density``: text rows keep everything."""
    if density is None or not layout.grid.text:
        return density
    text = layout.grid.text / layout.grid.tokens
    return min(1.0, max((density - text) / (1 - text), 1 / layout.grid.tokens))
