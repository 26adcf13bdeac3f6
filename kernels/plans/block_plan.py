"""BlockPlan: which key blocks does each query block see? The one answer every planner gives and every backend executes.

For each (batch or shared, head set, query block) a plan holds a list of key-block numbers in three runs:

    | complete …          | ragged …              | partial …                     |
    | visible, full-sized | visible, fewer rows   | visible where intervals agree |
    0                 ends[0]                 ends[1]                         ends[2]

The order is what makes a kernel fast: the first run needs no mask at all, the second masks the missing rows of a border block,
and only the third tests coordinates. A plan knows nothing of video: blocks are runs of rows, coordinates are three integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from tilewise.kernels.plans.interval_codes import encode, encode_intervals, fields, inside
from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS, Layout


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Lists of visible key blocks. Built by :func:`plan_from_block_map`, executed by ``block_sparse_attention``.

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
        coords: (3, Sk) key coordinates, None if no block is partial.
        intervals: (G, 6, Sq) lo and hi (exclusive) of each query row per axis: (lo0, hi0, lo1, hi1, lo2, hi2), or None.
        key_codes: (Sk,) ``coords`` with three axes in one integer (kernels/plans/interval_codes.py): the form that kernels read.
        row_codes: (G, 2, Sq) ``intervals`` in the same form.
        guard: the guard bits of both.
        density: token pairs that the mask keeps ÷ all pairs, in (0, 1]; mean over heads. nan where only the device knows it.
        work: token pairs in listed blocks, at full block size, ÷ all pairs: what a kernel computes. ≥ density, or nan as it is.
        device_density: () float32, the density of a plan made at a call (dynamic_plan.py), not yet waited for; or None.
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
    key_codes: torch.Tensor | None = None
    row_codes: torch.Tensor | None = None
    guard: int = 0
    device_density: torch.Tensor | None = None
    _cache: dict = field(default_factory=dict, repr=False)  # what a backend derives from a plan, kept with it

    @property
    def sets(self) -> int:
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

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
            name: value.to(device) if isinstance(value, torch.Tensor) else value
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
        assert self.key_codes is not None and self.row_codes is not None
        return inside(self.key_codes[k], self.row_codes[g][:, q], self.guard)


def plan_from_block_map(
    layout: Layout,
    full: torch.Tensor,
    partial: torch.Tensor | None = None,
    *,
    intervals: torch.Tensor | None = None,
    head_set: torch.Tensor | None = None,
    density: float | None = None,
) -> BlockPlan:
    """Turn block maps into a plan, on the device that the maps are on.

    Args:
        layout: gives the block table; queries and keys share it.
        full: (P, G, N, N) bool, True where every query of block i sees every key of block j.
        partial: the same shape, True where only ``intervals`` decides; never where ``full`` is.
        intervals: (G, 6, S) int, needed with ``partial``; see ``BlockPlan``.
        head_set: (H,) list set of each head, default: shared or one a head.
        density: kept ÷ all pairs, if the caller knows it; otherwise counted here (exactly).

    Raises:
        ValueError: if the maps have a wrong shape, ``partial`` comes without ``intervals``, or a grid with ``partial`` is so
            large that its three coordinates do not fit in 32 bits (more than about 2²⁹ positions).

    Text blocks are made full rows and columns here, for every method: text sees everything and is seen by everything.
    """
    N = layout.blocks
    if full.ndim != 4 or full.shape[2:] != (N, N):
        raise ValueError(f"plan_from_block_map: full must be (P, G, {N}, {N}) for this layout, got {tuple(full.shape)}")
    if partial is not None and (partial.shape != full.shape or intervals is None):
        raise ValueError("plan_from_block_map: partial needs the shape of full, and intervals to decide its pairs")
    device = full.device
    start, rows = layout.block_start.to(device), layout.block_rows.to(device)
    block = max(16, 1 << (int(layout.block_rows.max()) - 1).bit_length())
    text = layout.is_text.to(device)
    full = full | text[:, None] | text[None, :]
    # Rank of a block in its list: 0 complete, 1 ragged, 2 partial, 3 absent. A stable sort keeps memory order in each run.
    rank = torch.where(full, (rows < block).to(torch.uint8), torch.full((), 3, dtype=torch.uint8, device=device))
    if partial is not None:
        rank[partial & ~full] = 2
    ends = torch.stack([(rank <= run).sum(-1) for run in range(3)], dim=-1)
    longest = max(1, int(ends[..., 2].max()))
    index = torch.argsort(rank, dim=-1, stable=True)[..., :longest]

    weights = torch.ones(full.shape[1], dtype=torch.float64) / full.shape[1]
    if head_set is not None:
        weights = torch.bincount(head_set.long().cpu(), minlength=full.shape[1]).double() / len(head_set)
    if density is None:
        density = _density(layout, full, rank == 2 if partial is not None else None, intervals, weights.to(device))
    # A query block costs as many tiles of block × block as its list is long, however few rows it has.
    listed = ends[..., 2].double().mean((0, 2)) @ weights.to(device) * N
    work = float(listed) * block * block / layout.grid.tokens**2

    def int32(x: torch.Tensor) -> torch.Tensor:
        return x.to(device=device, dtype=torch.int32).contiguous()

    packed: dict[str, Any] = {}
    if partial is not None and intervals is not None:
        shifts, guard = fields(layout.grid.shape)
        packed = {
            "key_codes": encode(layout.coords.to(device), shifts),
            "row_codes": encode_intervals(intervals.to(device), shifts, guard),
            "guard": guard,
        }
    return BlockPlan(
        q_start=int32(start),
        q_rows=int32(rows),
        k_start=int32(start),
        k_rows=int32(rows),
        index=int32(index),
        key_start=int32(start[index]),
        ends=int32(ends),
        block=block,
        q_len=layout.grid.tokens,
        k_len=layout.grid.tokens,
        density=density,
        work=work,
        head_set=None if head_set is None else int32(head_set),
        coords=None if partial is None else int32(layout.coords),
        intervals=None if partial is None or intervals is None else int32(intervals),
        **packed,
    )


def dense_plan(layout: Layout, device: torch.device | str = "cpu") -> BlockPlan:
    """Every query sees every key: dense attention as a plan."""
    return plan_from_block_map(layout, torch.ones(1, 1, layout.blocks, layout.blocks, dtype=torch.bool, device=device))


@lru_cache(maxsize=32)
def plan_of_all(q_len: int, k_len: int, device: torch.device) -> BlockPlan:
    """Every one of q_len queries sees every one of k_len keys, which may be of another sequence: in full blocks."""

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


def _density(
    layout: Layout,
    full: torch.Tensor,
    partial: torch.Tensor | None,
    intervals: torch.Tensor | None,
    weights: torch.Tensor,
) -> float:
    """Kept token pairs ÷ all pairs, counted exactly: by block sizes, and row by row where intervals decide."""
    rows = layout.block_rows.to(full.device).double()
    kept = torch.einsum("pgij,i,j->g", full.double(), rows, rows) / full.shape[0]
    if partial is not None and intervals is not None:
        # For rows with partial blocks the interval counts every visible video key, in full blocks too: count those
        # rows by their interval alone (plus text), and take their full blocks out again.
        has_partial = partial.any(-1).double()
        kept = kept - torch.einsum("pgij,pgi,i,j->g", full.double(), has_partial, rows, rows) / full.shape[0]
        extent = torch.stack([intervals[:, 2 * a + 1] - intervals[:, 2 * a] for a in range(3)]).double().prod(0)
        per_row = extent.to(full.device) + layout.grid.text
        of_block = torch.arange(layout.blocks, device=full.device).repeat_interleave(layout.block_rows.to(full.device))
        kept = kept + torch.einsum("pgs,gs->g", has_partial[:, :, of_block], per_row) / full.shape[0]
    return float((kept @ weights) / layout.grid.tokens**2)
