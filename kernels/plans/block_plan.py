"""BlockPlan: which key blocks does each query block see? The one answer every planner gives and every backend executes.

For each (batch or shared, head set, query block) a plan holds a list of key-block numbers in three runs:

    | complete …          | ragged …              | partial …                     |
    | visible, full-sized | visible, fewer rows   | visible where intervals agree |
    0                 ends[0]                 ends[1]                         ends[2]

The order is what makes a kernel fast: the first run needs no mask at all, the second masks the missing rows of a border block,
and only the third tests coordinates. A plan knows nothing of video: blocks are runs of rows, coordinates are three integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from tilewise.kernels.plans.cells import FarField
from tilewise.kernels.plans.interval_encoding import encode_coords, encode_intervals, encoding_fields, inside
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Layout

TESTED_PAIRS = 1 << 24  # token pairs whose interval test is counted at a time


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Lists of visible key blocks. Built by :func:`plan_from_block_map`, executed by ``block_sparse_attention``.

    Queries and keys may be of one sequence or of two.

    Shapes: Nq, Nk query and key blocks; P 1 (shared) or the batch size; G head sets; M the longest list. int32 throughout.

    Attributes:
        q_start, q_rows: (Nq,) first row and number of rows of each query block.
        k_start, k_rows: (Nk,) the same for key blocks.
        index: (P, G, Nq, M) key-block numbers, complete, then ragged, then partial; what follows ``ends[..., 2]`` is unused.
        key_start: (P, G, Nq, M) ``k_start[index]``: saves a kernel one dependent load.
        ends: (P, G, Nq, 3) where the three runs of each list end.
        block: power of two ≥ every block's rows: the room that a kernel gives a block.
        q_len, k_len: sequence lengths the plan is for.
        head_set: (H,) the list set g of each head; None: all heads share set 0, or head h has set h if G > 1.
        coords: (3, Sk) key coordinates, −1 for text; None if no block is partial.
        intervals: (G, 6, Sq) lo and hi (exclusive) of the key coordinates that each query row sees, per axis:
            (lo0, hi0, lo1, hi1, lo2, hi2); or None.
        key_encoding: (Sk,) ``coords`` with three axes in one integer (interval_encoding.py), which kernels read.
        row_encoding: (G, 2, Sq) ``intervals`` in the same form.
        guard_bits: the guard bits of both.
        density: token pairs that the mask keeps ÷ all pairs, in (0, 1]; mean over heads. nan where only the device knows it.
        work: token pairs in listed blocks, at full block size, ÷ all pairs: what a kernel computes. ≥ density, or nan as it is.
        device_density: () float32, the density of a plan made at a call (dynamic_plan.py), not yet waited for; or None.
        head_density: (P, G) float32, the same of each list.
        far: means that stand for the keys which are not visible (far_field.py); None: those are left out.
    """

    q_start: torch.Tensor
    q_rows: torch.Tensor
    k_start: torch.Tensor
    k_rows: torch.Tensor
    index: torch.Tensor
    key_start: torch.Tensor
    ends: torch.Tensor
    block: int
    q_len: int
    k_len: int
    density: float
    work: float
    head_set: torch.Tensor | None = None
    coords: torch.Tensor | None = None
    intervals: torch.Tensor | None = None
    key_encoding: torch.Tensor | None = None
    row_encoding: torch.Tensor | None = None
    guard_bits: int = 0
    device_density: torch.Tensor | None = None
    head_density: torch.Tensor | None = None
    far: FarField | None = None
    _cache: dict = field(default_factory=dict, repr=False)  # what a backend derives from a plan, kept with it

    @property
    def sets(self) -> int:
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def cost(self) -> float:
        """Pairs that attention computes ÷ all token pairs: those that are kept, and those of a query and a mean."""
        return self.density if self.far is None else self.density + self.far.share

    @cached_property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        return self.density >= 1.0

    def sets_of_heads(self, heads: int) -> torch.Tensor:
        """(heads,) list set of each head."""
        if self.head_set is not None:
            return self.head_set
        if self.sets == 1:
            return torch.zeros(heads, dtype=torch.int32, device=self.device)
        return torch.arange(heads, dtype=torch.int32, device=self.device)

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor | FarField) else value
            for name, value in self.__dict__.items()
            if name in self.__dataclass_fields__ and name != "_cache"
        }
        return BlockPlan(**moved)

    def to_mask(self, heads: int) -> torch.Tensor:
        """(P, heads, Sq, Sk) bool, True where a query sees a key: for tests and pictures, never for work."""
        P, G, Nq, _ = self.index.shape
        mask = torch.zeros(P, G, self.q_len, self.k_len, dtype=torch.bool)
        starts, rows = self.k_start.tolist(), self.k_rows.tolist()
        for p in range(P):
            for g in range(G):
                for i in range(Nq):
                    q = slice(int(self.q_start[i]), int(self.q_start[i] + self.q_rows[i]))
                    _, full, total = self.ends[p, g, i].tolist()
                    for j, block in enumerate(self.index[p, g, i, :total].tolist()):
                        k = slice(starts[block], starts[block] + rows[block])
                        mask[p, g, q, k] = True if j < full else self.visible(g, q, k)
        return mask[:, self.sets_of_heads(heads).long().cpu()]

    def visible(self, g: int, q: slice | torch.Tensor, k: slice | torch.Tensor) -> torch.Tensor:
        """(rows of q, rows of k) bool: the interval test of head set ``g``."""
        assert self.key_encoding is not None and self.row_encoding is not None
        return inside(self.key_encoding[k], self.row_encoding[g][:, q], self.guard_bits)


def plan_from_block_map(
    layout: Layout,
    full: torch.Tensor,
    partial: torch.Tensor | None = None,
    *,
    key_layout: Layout | None = None,
    intervals: torch.Tensor | None = None,
    head_set: torch.Tensor | None = None,
    density: float | None = None,
) -> BlockPlan:
    """Turn block maps into a plan, on the device that the maps are on.

    Args:
        layout: block table of the queries, and of the keys too unless ``key_layout`` is given.
        full: (P, G, Nq, Nk) bool, True where every query of block i sees every key of block j.
        partial: the same shape, True where only ``intervals`` decides. Where ``full`` is True as well, ``full`` holds.
        key_layout: block table of the keys, for queries of another sequence than the keys (some frames against a KV cache, or
            one rank's queries against all keys). Kernels give all blocks of a plan the same room, so layouts with the same
            number of rows a block waste least.
        intervals: (G, 6, Sq) int, needed with ``partial``: coordinates of ``key_layout`` that each query row sees; see
            ``BlockPlan``.
        head_set: (H,) list set of each head, default: shared or one a head.
        density: kept ÷ all pairs, if the caller knows it; otherwise counted here (exactly).

    Raises:
        ValueError: if the maps, intervals or head sets have a wrong shape or range, ``partial`` comes without ``intervals``, or
            the key grid with ``partial`` is so large that its three coordinates do not fit in 32 bits (more than about 2²⁹
            positions).

    Text blocks are made full rows and columns here, for every method: text sees everything and is seen by everything.
    """
    keys = layout if key_layout is None else key_layout
    Nq, Nk = layout.blocks, keys.blocks
    if full.ndim != 4 or full.shape[2:] != (Nq, Nk):
        what = "this layout" if key_layout is None else "these layouts"
        raise ValueError(f"plan_from_block_map: full must be (P, G, {Nq}, {Nk}) for {what}, got {tuple(full.shape)}")
    if partial is not None and (partial.shape != full.shape or intervals is None):
        raise ValueError("plan_from_block_map: partial needs the shape of full, and intervals to decide its pairs")
    sets = full.shape[1]
    if partial is not None and intervals is not None and intervals.shape != (sets, 6, layout.grid.tokens):
        raise ValueError(
            f"plan_from_block_map: intervals must be (G, 6, Sq) = ({sets}, 6, {layout.grid.tokens}), got "
            f"{tuple(intervals.shape)}"
        )
    if head_set is not None and (head_set.ndim != 1 or not 0 <= int(head_set.min()) <= int(head_set.max()) < sets):
        raise ValueError(
            f"plan_from_block_map: head_set must be (H,) numbers below G = {sets}, got {head_set.tolist()}; give full a map "
            "for each"
        )
    device = full.device
    q_start, q_rows = layout.block_start.to(device), layout.block_rows.to(device)
    k_start, k_rows = keys.block_start.to(device), keys.block_rows.to(device)
    block = max(layout.room, keys.room)
    full = full | layout.is_text.to(device)[:, None] | keys.is_text.to(device)[None, :]
    # Rank of a block in its list: 0 complete, 1 ragged, 2 partial, 3 absent. A stable sort keeps memory order in each run.
    rank = torch.where(full, (k_rows < block).to(torch.uint8), torch.full((), 3, dtype=torch.uint8, device=device))
    if partial is not None:
        rank[partial & ~full] = 2
    ends = torch.stack([(rank <= run).sum(-1) for run in range(3)], dim=-1)
    longest = max(1, int(ends[..., 2].max()))
    index = torch.argsort(rank, dim=-1, stable=True)[..., :longest]

    def int32(x: torch.Tensor) -> torch.Tensor:
        return x.to(device=device, dtype=torch.int32).contiguous()

    packed: dict[str, Any] = {}
    if partial is not None and intervals is not None:
        shifts, guard_bits = encoding_fields(keys.grid.shape)
        packed = {
            "coords": int32(keys.coords),
            "intervals": int32(intervals),
            "key_encoding": encode_coords(keys.coords.to(device), shifts),
            "row_encoding": encode_intervals(intervals.to(device), shifts, guard_bits),
            "guard_bits": guard_bits,
        }
    q_len, k_len = layout.grid.tokens, keys.grid.tokens
    weights = torch.ones(sets, dtype=torch.float64) / sets
    if head_set is not None:
        weights = torch.bincount(head_set.long().cpu(), minlength=sets).double() / len(head_set)
    # A query block costs as many tiles of block × block as its list is long, however few rows it has.
    listed = float(ends[..., 2].double().mean((0, 2)).cpu() @ weights) * Nq
    plan = BlockPlan(
        q_start=int32(q_start),
        q_rows=int32(q_rows),
        k_start=int32(k_start),
        k_rows=int32(k_rows),
        index=int32(index),
        key_start=int32(k_start[index]),
        ends=int32(ends),
        block=block,
        q_len=q_len,
        k_len=k_len,
        density=math.nan if density is None else density,
        work=listed * block * block / (q_len * k_len),
        head_set=None if head_set is None else int32(head_set),
        **packed,
    )
    if density is not None:
        return plan
    kept = _kept_pairs(plan, layout, keys, full, rank == 2).cpu() @ weights
    return replace(plan, density=float(kept) / (q_len * k_len))


def dense_plan(layout: Layout, device: torch.device | str = "cpu", *, key_layout: Layout | None = None) -> BlockPlan:
    """Every query sees every key: dense attention as a plan."""
    keys = layout if key_layout is None else key_layout
    everything = torch.ones(1, 1, layout.blocks, keys.blocks, dtype=torch.bool, device=device)
    return plan_from_block_map(layout, everything, key_layout=key_layout)


def dense_plan_of_lengths(q_len: int, k_len: int, device: torch.device) -> BlockPlan:
    """Dense attention of q_len queries over k_len keys as a plan, without a layout: in runs of 128 rows.

    It is made on the device without waiting for it, and not cached: keep it where it is used again (``Layout.cached``).
    """

    def blocks(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.arange(0, length, MAX_BLOCK_ROWS, dtype=torch.int32, device=device)
        return start, (length - start).clamp(max=MAX_BLOCK_ROWS)

    (q_start, q_rows), (k_start, k_rows) = blocks(q_len), blocks(k_len)
    queries, keys = len(q_start), len(k_start)
    index = torch.arange(keys, dtype=torch.int32, device=device).repeat(1, 1, queries, 1)  # a ragged block comes last
    ends = torch.full((1, 1, queries, 3), keys, dtype=torch.int32, device=device)
    ends[..., 0] = k_len // MAX_BLOCK_ROWS
    work = queries * keys * MAX_BLOCK_ROWS**2 / (q_len * k_len)
    return BlockPlan(
        q_start, q_rows, k_start, k_rows, index, k_start[index.long()], ends, MAX_BLOCK_ROWS, q_len, k_len, 1.0, work
    )


def _kept_pairs(
    plan: BlockPlan, queries: Layout, keys: Layout, full: torch.Tensor, partial: torch.Tensor
) -> torch.Tensor:
    """(G,) float64: token pairs that each list set keeps, exact, mean over P."""
    q_rows, k_rows = plan.q_rows.double(), plan.k_rows.double()
    kept = torch.einsum("pgij,i,j->g", full.double(), q_rows, k_rows)
    if plan.intervals is not None and bool(partial.any()):
        tested = partial.any(-1)  # (P, G, Nq) query blocks that list partial blocks
        if _intervals_hold_for_all(plan, keys, full, partial, tested):
            # Then a row of those blocks sees what its intervals hold and the text, wherever that is listed.
            lengths = torch.tensor(keys.grid.shape, device=plan.device).view(3, 1)
            lo, hi = plan.intervals[:, 0::2].clamp(min=0), torch.minimum(plan.intervals[:, 1::2], lengths)
            per_row = (hi - lo).clamp(min=0).double().prod(1) + keys.grid.text  # (G, Sq)
            of_row = torch.repeat_interleave(plan.q_rows.long(), output_size=plan.q_len)
            kept = kept - torch.einsum("pgij,pgi,i,j->g", full.double(), tested.double(), q_rows, k_rows)
            kept = kept + torch.einsum("pgs,gs->g", tested[:, :, of_row].double(), per_row)
        else:
            kept = kept + _pairs_in_partial_blocks(plan, partial)
    return kept / full.shape[0]


def _intervals_hold_for_all(
    plan: BlockPlan, keys: Layout, full: torch.Tensor, partial: torch.Tensor, tested: torch.Tensor
) -> bool:
    """Whether intervals describe more than the partial blocks: in each query block with partial ones, every key of its full
    blocks lies in them and no key of a block that is not listed, as in a plan of windows. Text is not asked for."""
    assert plan.intervals is not None and plan.coords is not None
    lo, hi = plan.intervals[:, 0::2], plan.intervals[:, 1::2]
    lo_min, lo_max = (block_reduce(lo, plan.q_rows, how)[..., None] for how in ("amin", "amax"))  # (G, 3, Nq, 1)
    hi_min, hi_max = (block_reduce(hi, plan.q_rows, how)[..., None] for how in ("amin", "amax"))
    first, last = (block_reduce(plan.coords, plan.k_rows, how)[None, :, None] for how in ("amin", "amax"))
    inside = ((first >= lo_max) & (last < hi_min)).all(1)  # (G, Nq, Nk)
    outside = ((last < lo_min) | (first >= hi_max)).any(1)
    agrees = torch.where(full, inside, partial | outside)
    return bool((agrees | keys.is_text.to(plan.device) | ~tested[..., None]).all())


def block_maps(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(full, partial) of a plan, (P, G, Nq, Nk) bool each, as ``plan_from_block_map`` takes them."""
    listed = torch.arange(plan.index.shape[-1], device=plan.device)
    in_full, in_all = listed < plan.ends[..., 1:2], listed < plan.ends[..., 2:3]
    shape = (*plan.index.shape[:3], len(plan.k_start))
    maps = []
    for wanted in (in_full, in_all & ~in_full):
        # Entries past a list's end hold numbers of other blocks: those are sent to a column that is cut off.
        at = torch.where(wanted, plan.index.long(), shape[3])
        whole = torch.zeros(*shape[:3], shape[3] + 1, dtype=torch.bool, device=plan.device)
        maps.append(whole.scatter_(-1, at, True)[..., :-1])
    return maps[0], maps[1]


def block_reduce(x: torch.Tensor, rows: torch.Tensor, how: str) -> torch.Tensor:
    """(…, N) from (…, S): "amin" or "amax" of each block, where blocks are consecutive runs of ``rows`` (N,)."""
    of_row = torch.repeat_interleave(rows.long(), output_size=x.shape[-1])
    room = x.new_zeros(*x.shape[:-1], len(rows))
    return room.scatter_reduce(-1, of_row.expand_as(x), x, how, include_self=False)


def _pairs_in_partial_blocks(plan: BlockPlan, partial: torch.Tensor) -> torch.Tensor:
    """(G,) float64: token pairs of partial blocks that pass the interval test, summed over P: tested one by one."""
    assert plan.key_encoding is not None and plan.row_encoding is not None
    kept = torch.zeros(partial.shape[1], dtype=torch.float64, device=plan.device)
    row = torch.arange(plan.block, device=plan.device)
    for of_pairs in partial.nonzero()[:, 1:].split(max(1, TESTED_PAIRS // plan.block**2)):
        g, i, j = of_pairs.unbind(1)
        at_q, there_q = plan.q_start[i, None] + row, row < plan.q_rows[i, None]
        at_k, there_k = plan.k_start[j, None] + row, row < plan.k_rows[j, None]
        of_rows = plan.row_encoding[g[:, None], :, at_q.clamp(max=plan.q_len - 1)].transpose(1, 2)  # (pairs, 2, rows)
        seen = inside(plan.key_encoding[at_k.clamp(max=plan.k_len - 1)], of_rows, plan.guard_bits)
        seen &= there_q[:, :, None] & there_k[:, None]
        kept.index_add_(0, g, seen.sum((1, 2)).double())
    return kept
