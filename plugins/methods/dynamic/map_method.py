"""What all methods that look before they choose share: a map of expected attention mass goes in, a plan comes out.

    map of blocks  →  rank  →  choose  →  lists of key blocks  (+ summary rows of what is skipped)
    (the method's)    by mass or    the method's rule, or
                      by error      one of base.py's

A method with a rule of its own is one file that gives ``draft``, the logits of its map, and ``choose``, the pairs that it keeps.
One that keeps a density or a recall of what its map says gives ``draft`` alone, on top of base.py. Everything runs on the device
of the queries and nothing waits for it.

Queries and keys are the same tokens; or the keys are those of the window of a KV cache, of which the queries' chunk is a part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from tilewise.kernels.device import capturing
from tilewise.kernels.plans.dynamic_plan import dynamic_plan
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Grid, Layout, cached_layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.kernels.selection.block_scores import error_logits, summary_bias
from tilewise.kernels.selection.block_stats import BlockStats, block_stats
from tilewise.plugins.methods.base import BlockCompensation, DynamicMethod, Method, Planned, with_tile
from tilewise.plugins.methods.dynamic.always_keep import always_kept
from tilewise.plugins.methods.dynamic.block_logits import score_variance
from tilewise.plugins.methods.dynamic.options import checked_map
from tilewise.plugins.methods.dynamic.recall_probe import exact_recall, probe_rows
from tilewise.plugins.methods.dynamic.reuse import Drift
from tilewise.plugins.methods.dynamic.selection import broken_rows
from tilewise.plugins.methods.dynamic.tiles import (
    DEFAULT_TILE,
    MAX_BLOCKS,
    MIN_TOKENS,
    SMALLEST_TILE,
    Triple,
    default_tile,
)
from tilewise.plugins.methods.dynamic.windowed_selection import Bounds, bounds_of, plan_within
from tilewise.plugins.tuning.in_use import least_tokens


@dataclass(frozen=True)
class DraftMap:
    """What a method expects, before anything is chosen.

    Attributes:
        logits: (B, H, Nq, Nk) float32, log of the attention mass of query block i in key block j, up to a constant of the row.
        keys: means and variances of the key blocks, if the method made both.
        s2: (B, H, Nq, Nk) float32, the variance of scores within a key block, if the method knows it.
        scores: what the method's own rule goes by, where that is not the logits; its ``choose`` alone reads it.
    """

    logits: torch.Tensor
    keys: BlockStats | None = None
    s2: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """What ``MapMethod.choose`` has to choose from.

    Attributes:
        layout, keys: the blocks of the queries, and of the keys.
        logits: (B, H, Nq, Nk) float32, those of the map; −inf outside of a window.
        ranked: (B, H, Nq, Nk) float32, the same, or log of the error that skipping a pair makes, as ``ranks_by_error`` says.
        scores: those of the map.
        always: (Nq, Nk) bool, pairs that are kept in any case, text among them.
        rows, key_rows: (Nq,) and (Nk,) int32, tokens of each block.
        key_text: (Nk,) bool, blocks of text.
    """

    layout: Layout
    keys: Layout
    logits: torch.Tensor
    ranked: torch.Tensor
    scores: torch.Tensor | None
    always: torch.Tensor
    rows: torch.Tensor
    key_rows: torch.Tensor
    key_text: torch.Tensor

    def density_of_rows(self, density: float) -> float:
        """See the function of this name."""
        return density_of_rows(self.layout.grid, density)


def density_of_rows(grid: Grid, density: float) -> float:
    """What the rows of video must keep for the whole to keep ``density``: those of text keep everything."""
    if not grid.text:
        return density
    text = grid.text / grid.tokens
    return min(1.0, max((density - text) / (1 - text), 1 / grid.tokens))


@dataclass(frozen=True)
class BlockMeans:
    """Statistics of key and value blocks, and the variance of scores (B, H, Nq, Nk). values.variance: None where it is not
    ranked by error."""

    keys: BlockStats
    values: BlockStats
    s2: torch.Tensor


@dataclass(frozen=True)
class CallMaps:
    """What a call is planned by, before anything is chosen.

    Attributes:
        candidates: what is chosen from; ``always`` those of the window of every head.
        always: (Nq, Nk) bool, pairs that are kept in any case, where a head's window has them.
        blocks: what ranking by error and compensation go by; None: neither is asked for.
        bounds: of the window that limits the choice; None: there is none.
    """

    candidates: Candidates
    always: torch.Tensor
    blocks: BlockMeans | None
    bounds: Bounds | None


@dataclass(frozen=True, kw_only=True)
class MapMethod(DynamicMethod):
    """Options that all such methods share.

    Args:
        tile: tokens of a block (t, h, w), at most 128. Default (1, 8, 16); without text in the sequence, halved until the grid
            has 64 of them.
        compensate: put one summary row in the place of each block that is skipped (block_compensation.py). Default: on. On the
            bundled demo model it divides the error of attention by 1.5 to 2.6 (benchmarks/attention_error.py).
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
        ConfigError: for values outside those ranges.
    """

    tile: Triple | None = None
    compensate: bool | None = None
    always: tuple[str, ...] = ("self",)
    within: Any = None
    refresh: int = 1
    drift: float | None = 0.02
    probe: int = 0
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in checked_map(self).items():
            object.__setattr__(self, name, value)

    # ── before anything runs ─────────────────────────────────────────────────────────────────────────────────────

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with its window's method prepared."""
        return self if self.within is None else dataclasses.replace(self, within=self.within.prepare(target, denoiser))

    def check(self, heads: int) -> None:
        if self.within is not None:
            self.within.check(heads)

    def of_heads(self, heads: Sequence[int]) -> Self:
        return self if self.within is None else dataclasses.replace(self, within=self.within.of_heads(heads))

    def refuses_some_heads(self) -> str | None:
        if self.refresh > 1 and self.drift is not None:
            return "drift goes by the recall of all heads, and each rank has some; give drift=None, or refresh=1"
        return None if self.within is None else self.within.refuses_some_heads()

    def refuses_some_samples(self) -> str | None:
        if self.refresh > 1 and self.drift is not None:
            return (
                "drift goes by the recall of a whole batch, and each half of the processes has half of it; give drift=None, or "
                "refresh=1"
            )
        return None

    def layout(self, grid: Grid) -> Layout:
        # Text in the sequence is cut at 128 rows, and a kernel's block has room for as many: smaller tiles would leave it empty.
        usual = DEFAULT_TILE if grid.text >= SMALLEST_TILE else default_tile(grid.shape)
        return cached_layout(grid, self.tile or usual)

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        return None if self.within is None else self.within.scale(layout, head_dim)

    def describe(self, layout: Layout) -> dict[str, Any]:
        within = {"within": self.within.to_dict()} if self.within is not None else {}
        return {**self.target(), "compensate": self.compensates, **within}

    def target(self) -> dict[str, Any]:
        """The options that say how much is kept, and by which rule, for ``explain``."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        within = None if self.within is None else self.within.to_dict()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **fields, "within": within}

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
        least = self.min_tokens
        if least is None:
            tuned = least_tokens(self.name, device)
            least = MIN_TOKENS.get(device.type, 0) if tuned is None else tuned
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

    @property
    def keeps_everything(self) -> bool:
        """Whether it was asked to: a rule may stop a rounding error short of it."""
        return False

    @property
    def ranks_by_error(self) -> bool:
        """Whether ``Candidates.ranked`` is the error that skipping a pair would make."""
        return False

    # ── a call ───────────────────────────────────────────────────────────────────────────────────────────────────

    def draft(
        self, layout: Layout, query: torch.Tensor, key: torch.Tensor, scale: float, key_layout: Layout | None = None
    ) -> DraftMap:
        """The method's map of a call: query (B, Sq, H, D) and key (B, Sk, Hk, D).

        layout: the blocks of the queries. key_layout: those of the keys; None: the same.
        """
        raise NotImplementedError

    def choose(self, candidates: Candidates) -> torch.Tensor:
        """(B, H, Nq, Nk) bool: the pairs that the method keeps. Those with text, and rows that are broken, are seen to."""
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
        maps = self.maps_of(layout, query, key, value, scale, window)
        return self.planned(maps, (query, key), scale, self.choose, memory, tick)

    def maps_of(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: WindowKeys | None = None,
    ) -> CallMaps:
        """What a call is planned by; its arguments are those of ``plan_call``."""
        heads = query.shape[2]
        keys = layout if window is None else window.layout
        _, rows, _ = layout.block_table(query.device)
        _, key_rows, key_text = keys.block_table(query.device)
        bounds = self._bounds(layout, heads, query.device, window)
        drafted = self.draft(layout, query, key, scale, keys)
        logits = drafted.logits
        if bounds is not None:
            logits = logits.masked_fill(~bounds.seen_by_head(heads), -math.inf)
        blocks = self._block_stats(layout, keys, drafted, query, key, value, scale)
        ranked = logits
        if blocks is not None and blocks.values.variance is not None:
            ranked = error_logits(logits, blocks.s2, blocks.values.variance.sum(-1).transpose(1, 2))
        wanted = always_kept(layout, self.always, query.device, window)
        always = wanted if bounds is None else wanted & bounds.seen_by_all()
        candidates = Candidates(layout, keys, logits, ranked, drafted.scores, always, rows, key_rows, key_text)
        return CallMaps(candidates, wanted, blocks, bounds)

    def planned(
        self,
        maps: CallMaps,
        qk: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        choose_from: Callable[[Candidates], torch.Tensor],
        memory: dict[str, Any],
        tick: int,
    ) -> Planned:
        """The plan of a call by its maps. choose_from: as ``choose``; the other arguments are those of ``plan_call``."""
        (query, key), blocks, bounds, c = qk, maps.blocks, maps.bounds, maps.candidates
        heads, layout, rows, key_rows = query.shape[2], c.layout, c.rows, c.key_rows
        share, broken = c.logits.softmax(-1), broken_rows(c.ranked)

        def choose() -> torch.Tensor:
            if self.keeps_everything:
                return torch.ones_like(c.logits, dtype=torch.bool)
            kept = choose_from(c) | broken[..., None]
            if bounds is not None:  # those within the window of some heads alone
                kept = kept | (maps.always & bounds.seen_by_head(heads))
            _, _, text = layout.block_table(query.device)
            kept = kept | text[:, None] | c.key_text[None, :]
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
        plan = dynamic_plan(layout, kept, key_layout=c.keys) if bounds is None else plan_within(bounds, kept)
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

    def _hidden(self, bounds: Bounds, heads: int) -> torch.Tensor:
        """(1, H or 1, Nq, Nk) bool: blocks that no mean stands for. What is outside the window is not skipped but invisible,
        unless the window has a far field; and the mean of a block partly outside would show what is."""
        whole = bounds.whole_by_head(heads)
        return ~whole if getattr(self.within, "far", None) is None else bounds.seen_by_head(heads) & ~whole

    def _bounds(
        self, layout: Layout, heads: int, device: torch.device, window: WindowKeys | None = None
    ) -> Bounds | None:
        return None if self.within is None else _window_bounds(self.within, layout, heads, device, window)

    def _block_stats(
        self,
        layout: Layout,
        key_layout: Layout,
        drafted: DraftMap,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> BlockMeans | None:
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
        return BlockMeans(keys, block_stats(value, start, rows, variance=self.ranks_by_error), s2)


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
