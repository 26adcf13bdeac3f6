"""A dynamic choice inside a static window: of each list of key blocks that a window's plan has, only the chosen ones stay.

    list of the window    | complete … | ragged … | partial … |
    kept there               1 0 0 1       1 0        0 1           →   | complete | ragged | partial |, shorter

What a partial block shows is still decided by the window's own intervals, so that nothing outside the window is ever seen:
exact by construction. Nothing waits for the device.

A partial block may show some rows of a query block nothing. Where a choice consists of such blocks, those that hold the visible
key nearest to each row are added to it (``with_a_key``), so that no row is left without a key.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from tilewise.kernels.plans.block_plan import BlockPlan, block_reduce
from tilewise.kernels.plans.interval_encoding import inside

CHUNK = 1 << 22  # pairs of a query row and a key block that are counted at a time


@dataclass(frozen=True)
class Bounds:
    """A window's plan in the forms that a dynamic method asks for, made once for a layout.

    Queries are the last of the keys, as a chunk is of the frames that a KV cache has; or all of them.

    Attributes:
        plan: the window's.
        seen: (G, Nq, Nk) bool, pairs of blocks of which any tokens see each other.
        whole: (G, Nq, Nk) bool, those of which all do.
        pairs: (G, Nq, M) float32, token pairs that see each other in each place of the plan's lists.
        enough: (G, Nq, Nk) bool, pairs of blocks in which every query sees a key; None: all that any tokens see each other in.
        nearest: (G, Nq, Nk) bool, key blocks that together show every query of a block a key; None with ``enough``.
    """

    plan: BlockPlan
    seen: torch.Tensor
    whole: torch.Tensor
    pairs: torch.Tensor
    enough: torch.Tensor | None = None
    nearest: torch.Tensor | None = None

    def whole_by_head(self, heads: int) -> torch.Tensor:
        """(1, H or 1, Nq, Nk) bool."""
        return self._by_head(self.whole, heads)

    def seen_by_head(self, heads: int) -> torch.Tensor:
        """(1, H or 1, Nq, Nk) bool."""
        return self._by_head(self.seen, heads)

    def _by_head(self, pairs: torch.Tensor, heads: int) -> torch.Tensor:
        return pairs[None] if self.plan.sets == 1 else pairs[self.plan.sets_of_heads(heads).long()][None]

    def with_a_key(self, kept: torch.Tensor) -> torch.Tensor:
        """(B, H, Nq, Nk) bool: pairs that are kept, with those that every query of the block needs to see a key. A query block
        that keeps nothing is left as it is."""
        if self.enough is None or self.nearest is None:
            return kept
        heads = kept.shape[1]
        sure = (kept & self._by_head(self.enough, heads)).any(-1, keepdim=True)
        return kept | (self._by_head(self.nearest, heads) & kept.any(-1, keepdim=True) & ~sure)

    def visible(self, at: torch.Tensor, of_query: torch.Tensor, of_key: torch.Tensor, heads: int) -> torch.Tensor:
        """(1, H, P, Sk) bool: the keys within the window of queries ``at``; of_query, of_key: (Sq,) and (Sk,) block of each
        token."""
        whole = self.whole_by_head(heads).expand(1, heads, -1, -1)[:, :, of_query[at]][..., of_key]
        plan = self.plan
        if plan.row_encoding is None or plan.key_encoding is None:
            return whole
        some = self.seen_by_head(heads).expand(1, heads, -1, -1)[:, :, of_query[at]][..., of_key]
        agree = torch.stack([inside(plan.key_encoding, codes[:, at], plan.guard_bits) for codes in plan.row_encoding])
        return whole | (some & self._by_head(agree, heads))

    def seen_by_all(self) -> torch.Tensor:
        """(Nq, Nk) bool: pairs within the window of every head."""
        return self.seen.all(0)


def bounds_of(plan: BlockPlan) -> Bounds:
    """Read a window's plan; its key blocks must be boxes of the grid, as those of tiles with at most 128 tokens are."""
    _, G, N, M = plan.index.shape
    keys = len(plan.k_start)
    place = torch.arange(M, device=plan.device)
    listed = place < plan.ends[0, :, :, 2:]
    index = plan.index[0].long()

    def pairs_of(places: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(G, N, keys + 1, dtype=torch.bool, device=plan.device)
        return found.scatter_(-1, torch.where(places, index, keys), True)[..., :keys]

    rows = plan.q_rows[None, :, None] * plan.k_rows[index]
    pairs = torch.where(listed, rows, 0).float()
    seen, whole = pairs_of(listed), pairs_of(place < plan.ends[0, :, :, 1:2])
    if plan.row_encoding is None:
        return Bounds(plan, seen, whole, pairs)
    partial = listed & (place >= plan.ends[0, :, :, 1:2])
    tested, queries = _partial_pairs(plan)
    enough = whole | pairs_of(partial & (queries == plan.q_rows[:, None]))
    return Bounds(plan, seen, whole, torch.where(partial, tested, pairs), enough, _nearest_blocks(plan, seen))


def _partial_pairs(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, Nq, M) float32: token pairs that the intervals leave, and queries that see a key, if every listed block were partial.

    A key block is a box, so per query row the axes multiply: Π over axes of |[lo, hi) ∩ [first, last]|. Some rows at a time:
    all of them would be S × M numbers.
    """
    assert plan.coords is not None and plan.intervals is not None
    _, G, N, M = plan.index.shape
    first, last = (block_reduce(plan.coords, plan.k_rows, how) for how in ("amin", "amax"))
    block_of_row = torch.repeat_interleave(plan.q_rows.long(), output_size=plan.q_len)
    pairs, queries = (torch.zeros(G, N, M, device=plan.device) for _ in range(2))
    for g in range(G):
        index, intervals = plan.index[0, g].long(), plan.intervals[g]
        for rows in torch.arange(plan.q_len, device=plan.device).split(max(1, CHUNK // M)):
            blocks = block_of_row[rows]
            listed = index[blocks]  # (rows, M)
            count = torch.ones_like(listed, dtype=torch.float32)
            for axis in range(3):
                lo, hi = intervals[2 * axis, rows, None], intervals[2 * axis + 1, rows, None]
                shared = torch.minimum(hi, last[axis][listed] + 1) - torch.maximum(lo, first[axis][listed])
                count *= shared.clamp_min(0)
            pairs[g].index_add_(0, blocks, count)
            queries[g].index_add_(0, blocks, (count > 0).float())
    return pairs, queries


def _nearest_blocks(plan: BlockPlan, seen: torch.Tensor) -> torch.Tensor:
    """(G, Nq, Nk) bool: the blocks of the visible keys that are nearest to each query, which is itself where it is visible.

    seen: (G, Nq, Nk) bool, pairs that the plan lists. A query block of which a nearest key lies in a block that is not listed, as
    where the intervals are those of other blocks alone, gets all that it lists.
    """
    assert plan.coords is not None and plan.intervals is not None
    G, N, K = seen.shape
    queries = plan.coords[:, -plan.q_len :]
    shape = plan.coords.amax(1).long() + 1
    of_query = torch.repeat_interleave(plan.q_rows.long(), output_size=plan.q_len)
    of_key = torch.repeat_interleave(plan.k_rows.long(), output_size=plan.k_len)

    def raster(coords: torch.Tensor) -> torch.Tensor:
        t, h, w = coords.clamp_min(0).long().unbind(-2)
        return (t * shape[1] + h) * shape[2] + w

    block_at = torch.zeros(plan.k_len, dtype=torch.long, device=plan.device)
    block_at.scatter_(0, torch.where(plan.coords[0] >= 0, raster(plan.coords), plan.k_len - 1), of_key)
    lo = plan.intervals[:, 0::2].clamp_min(0)
    last = torch.minimum(plan.intervals[:, 1::2], shape[:, None]) - 1
    nearest = torch.maximum(torch.minimum(queries, last), lo)
    some = (lo <= last).all(1) & (queries[0] >= 0)  # (G, Sq)
    key_block = torch.where(some, block_at[raster(nearest).clamp_max(plan.k_len - 1)], K)
    found = torch.zeros(G, N * (K + 1), dtype=torch.bool, device=plan.device)
    found = found.scatter_(1, of_query * (K + 1) + key_block, True).view(G, N, K + 1)[..., :K]
    return torch.where((found & ~seen).any(-1, keepdim=True), seen, found)


def plan_within(bounds: Bounds, kept: torch.Tensor) -> BlockPlan:
    """The window's plan with only the pairs of blocks that are kept.

    Args:
        kept: (B, H, Nq, Nk) bool on the plan's device.

    Returns:
        A plan of B × H lists; ``density`` and ``work`` nan, ``device_density`` on the device, as of ``dynamic_plan``. A query
        block that would keep nothing keeps all that its window lets it see; in the others every query sees a key too, see
        ``with_a_key``.
    """
    plan = bounds.plan
    kept = bounds.with_a_key(kept)
    B, H, N, _ = kept.shape
    sets = plan.sets_of_heads(H).long()
    index, ends, pairs = plan.index[0][sets], plan.ends[0][sets], bounds.pairs[sets]  # (H, N, M or 3)
    M = index.shape[-1]
    place = torch.arange(M, device=plan.device)
    chosen = kept.gather(-1, index.long().expand(B, H, N, M)) & (place < ends[..., 2:])
    chosen = chosen | (~chosen.any(-1, keepdim=True) & (place < ends[..., 2:]))
    position = torch.where(chosen, chosen.cumsum(-1) - 1, M)
    # One place more than the lists are long takes what is not chosen.
    found = torch.zeros(B, H, N, M + 1, dtype=torch.int32, device=plan.device)
    found.scatter_(-1, position, index.expand(B, H, N, M))
    found = found[..., :M].contiguous()
    runs = torch.stack([(chosen & (place < ends[..., run, None])).sum(-1, dtype=torch.int32) for run in range(3)], -1)
    row_encoding, intervals = plan.row_encoding, plan.intervals
    if row_encoding is not None and plan.sets > 1:  # lists are per head now, and so must be the intervals
        row_encoding = row_encoding[sets].contiguous()
        intervals = None if intervals is None else intervals[sets].contiguous()
    elif row_encoding is not None:
        row_encoding = row_encoding.expand(H, -1, -1).contiguous()
        intervals = None if intervals is None else intervals.expand(H, -1, -1).contiguous()
    return dataclasses.replace(
        plan,
        index=found,
        key_start=plan.k_start[found.long()],
        ends=runs,
        head_set=None,
        row_encoding=row_encoding,
        intervals=intervals,
        density=math.nan,
        work=math.nan,
        device_density=((pairs * chosen).double().sum() / (B * H * plan.q_len * plan.k_len)).float(),
        _cache={},
    )
