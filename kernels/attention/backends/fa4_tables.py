"""A BlockPlan in the form that FlashAttention-4's kernel takes: two lists of blocks, padding, and the encoding of its mask.

Every block there is exactly 128 rows. The kernel walks two lists for each query block:

    a plan's run          without padding                with every block padded to 128 rows
    complete              full                           full
    ragged (short rows)   full: only the sequence's      masked: padding is not visible
                          last block, cut off by FA4
    partial               masked: the interval test      masked: padding, then the interval test

A plan whose blocks are all 128 rows (but for the last) needs no padding. Any other is padded where that adds at most a quarter
to the rows. The mask is a function of one integer a key and two a query (``seen``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tilewise.kernels.plans.block_plan import BlockPlan
from tilewise.kernels.plans.interval_encoding import encode_coords, encode_intervals

ROWS = 128  # of a block, for queries and for keys
MAX_PADDING = 1.25  # padded rows ÷ rows
MAX_TABLE_BYTES = 1 << 30  # of lists repeated for every head

# Coordinates of a token in one integer (kernels/plans/interval_encoding.py), with fields of the same width for every grid.
SHIFTS = [20, 10, 0]
GUARD = 1 << 29 | 1 << 19 | 1 << 9
LARGEST = 510  # coordinate; 511 on every axis marks padding, beyond every interval
PADDING = 511 << 20 | 511 << 10 | 511
ANYWHERE = -1  # encoding of a text key: every query sees it


def seen(key: Any, first: Any, last: Any) -> Any:
    """Whether a key's encoding lies in an interval given by the encodings of its first and last coordinates, the latter with
    guard bits. Written once for the kernel and for what tests it: the arguments may be anything that has int32's operators."""
    return (((key | GUARD) - first) & (last - key) & GUARD) == GUARD


class Fa4Tables(NamedTuple):
    """A plan in FA4's form. P 1 or the batch size, H 1 or the number of heads, int32 unless said.

    full_count, mask_count: (P, H, Nm) lengths of the lists of each query block of ``q_rows`` rows.
    full_index, mask_index: (P, H, Nm, ·) key-block numbers.
    q_source, k_source: (padded rows,) int64 row of the sequence that each padded row is gathered from. None: no padding.
    q_padding, k_padding: int64 padded rows to be set to 0.
    q_place: (Sq,) int64 padded row of each row.
    key_encoding: (padded Sk,) encoding of each key; None if there is nothing to mask.
    row_encoding: (G, 2, padded Sq) encodings of the first and last key that a query sees; None if no block is partial.
    head_set: (heads,) which of the G a head uses.
    has_text: whether any key has the encoding ``ANYWHERE``.
    q_rows: rows of a query block: 128, or 256 on Blackwell, where FA4 computes two tiles of queries with one list.
    """

    full_count: torch.Tensor
    full_index: torch.Tensor
    mask_count: torch.Tensor
    mask_index: torch.Tensor
    q_source: torch.Tensor | None
    q_padding: torch.Tensor | None
    q_place: torch.Tensor | None
    k_source: torch.Tensor | None
    k_padding: torch.Tensor | None
    key_encoding: torch.Tensor | None
    row_encoding: torch.Tensor | None
    head_set: torch.Tensor | None
    has_text: bool
    q_rows: int


def tables_of(plan: BlockPlan, pairs: bool) -> Fa4Tables | str:
    """Tables of a plan, kept with it, or why it has none. pairs: query blocks two by two, as FA4 wants them on Blackwell."""
    key = ("fa4", pairs)
    if key not in plan._cache:
        plan._cache[key] = make_tables(plan, pairs)
    return plan._cache[key]


def make_tables(plan: BlockPlan, pairs: bool = False) -> Fa4Tables | str:
    """FA4's form of a plan, on the plan's device, or why there is none."""
    if (refusal := _refusal(plan)) is not None:
        return refusal
    padded = not (_aligned(plan.q_rows) and _aligned(plan.k_rows))
    complete, ragged, total = plan.ends.unbind(-1)
    full_count = complete if padded else ragged
    longest = max(1, int(full_count.max()))
    mask_count = total - full_count
    most = max(1, int(mask_count.max()))
    at = full_count[..., None] + torch.arange(most, device=plan.device)
    mask_index = plan.index.gather(-1, at.clamp(max=plan.index.shape[-1] - 1).long())
    lists = [full_count, plan.index[..., :longest], mask_count, mask_index]
    if plan.head_set is not None and plan.sets > 1:
        if len(plan.head_set) * sum(x[:, :1].numel() * 4 for x in lists) > MAX_TABLE_BYTES:
            return f"its lists for {len(plan.head_set)} heads would take more than {MAX_TABLE_BYTES >> 30} GiB"
        lists = [x[:, plan.head_set.long()] for x in lists]
    if pairs:
        if not _paired(lists):
            return "it takes query blocks two by two on this GPU, and not all pairs of blocks list the same keys"
        lists = [x[:, :, ::2] for x in lists]

    q_source = q_padding = q_place = k_source = k_padding = None
    if padded:
        q_source, q_padding, q_place = _padded_rows(plan.q_start, plan.q_rows)
        k_source, k_padding, _ = _padded_rows(plan.k_start, plan.k_rows)
    key_encoding = row_encoding = None
    has_text = False
    if bool((mask_count > 0).any()):
        key_encoding, row_encoding, has_text = _encodings(plan, k_source, k_padding, q_source)
    full_count, full_index, mask_count, mask_index = (x.to(torch.int32).contiguous() for x in lists)
    return Fa4Tables(
        full_count=full_count,
        full_index=full_index,
        mask_count=mask_count,
        mask_index=mask_index,
        q_source=q_source,
        q_padding=q_padding,
        q_place=q_place,
        k_source=k_source,
        k_padding=k_padding,
        key_encoding=key_encoding,
        row_encoding=row_encoding,
        head_set=None if row_encoding is None or plan.sets == 1 else _head_set(plan),
        has_text=has_text,
        q_rows=2 * ROWS if pairs else ROWS,
    )


def _refusal(plan: BlockPlan) -> str | None:
    for what, start, rows, length in (
        ("query", plan.q_start, plan.q_rows, plan.q_len),
        ("key", plan.k_start, plan.k_rows, plan.k_len),
    ):
        if not torch.equal(rows.cumsum(0) - rows, start.long()) or int(rows.sum()) != length or int(rows.max()) > ROWS:
            return f"its {what} blocks are not consecutive runs of at most {ROWS} rows"
        if len(rows) * ROWS > MAX_PADDING * length and not _aligned(rows):
            return (
                f"{len(rows)} {what} blocks padded to {ROWS} rows would be {len(rows) * ROWS / length:.2f} × the sequence, "
                f"more than {MAX_PADDING}"
            )
    if plan.intervals is None or plan.coords is None:
        return None
    if int(plan.coords.max()) > LARGEST:
        return f"coordinates beyond {LARGEST} do not fit its mask's encoding"
    if not _ragged_inside(plan):
        return "a short block is listed as visible outside of the intervals that its mask tests"
    return None


def _aligned(rows: torch.Tensor) -> bool:
    """Whether every block but the last has all of its rows, so that block i begins at row 128 i."""
    return bool((rows[:-1] == ROWS).all())


def _paired(lists: list[torch.Tensor]) -> bool:
    """Whether query blocks 2 i and 2 i + 1 have the same lists (a last one without a partner has)."""
    full_count, full_index, mask_count, mask_index = (
        x[:, :, : x.shape[2] // 2 * 2].unflatten(2, (-1, 2)) for x in lists
    )
    if full_count.numel() == 0:
        return False
    same = (full_count[..., 0] == full_count[..., 1]) & (mask_count[..., 0] == mask_count[..., 1])
    for count, index in ((full_count, full_index), (mask_count, mask_index)):
        unused = torch.arange(index.shape[-1], device=index.device) >= count[..., :1]
        same &= ((index[..., 0, :] == index[..., 1, :]) | unused).all(-1)
    return bool(same.all())


def _padded_rows(start: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(source of each padded row: the block's last row for padding, the padded rows that are padding, place of each row)."""
    within = torch.arange(ROWS, device=start.device)
    source = start.long()[:, None] + torch.minimum(within, rows.long()[:, None] - 1)
    inside = (within < rows[:, None]).flatten()
    return source.flatten(), (~inside).nonzero().flatten(), inside.nonzero().flatten()


def _head_set(plan: BlockPlan) -> torch.Tensor:
    return plan.sets_of_heads(plan.sets if plan.head_set is None else len(plan.head_set)).contiguous()


def _partial_rows(plan: BlockPlan) -> torch.Tensor:
    """(G, Sq) bool: rows of blocks that list a partial block. What the others list they see wholly."""
    has = (plan.ends[..., 2] > plan.ends[..., 1]).any(0)
    return has.repeat_interleave(plan.q_rows.long(), dim=-1)


def _encodings(
    plan: BlockPlan, k_source: torch.Tensor | None, k_padding: torch.Tensor | None, q_source: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """(key encoding, row encoding or None, whether there is text), with room for whole blocks."""
    partial = plan.intervals is not None and plan.coords is not None
    keys = torch.zeros(plan.k_len, dtype=torch.int32, device=plan.device)
    has_text, row_encoding = False, None
    if partial:
        assert plan.intervals is not None and plan.coords is not None
        text = plan.coords[0] < 0
        has_text = bool(text.any())
        keys = encode_coords(plan.coords, SHIFTS).masked_fill(text, ANYWHERE)
        everything = torch.tensor([0, LARGEST + 1] * 3, device=plan.device, dtype=plan.intervals.dtype)
        intervals = torch.where(_partial_rows(plan)[:, None], plan.intervals, everything[:, None])
        row_encoding = encode_intervals(intervals, SHIFTS, GUARD)
        row_encoding = _room(row_encoding) if q_source is None else row_encoding[..., q_source]
    if k_source is None or k_padding is None:
        return _room(keys), row_encoding, has_text
    return keys[k_source].index_fill(0, k_padding, PADDING), row_encoding, has_text


def _room(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last axis extended to a multiple of 256: FA4 reads tables for the whole of its last block."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % (2 * ROWS))).contiguous()


def _ragged_inside(plan: BlockPlan) -> bool:
    """Whether the interval test agrees with the ragged runs: it is applied to them too, to mask their padding."""
    assert plan.intervals is not None and plan.coords is not None
    tested = _partial_rows(plan)
    of_query = torch.arange(len(plan.q_rows), device=plan.device).repeat_interleave(plan.q_rows.long())
    of_key = torch.arange(len(plan.k_rows), device=plan.device).repeat_interleave(plan.k_rows.long())
    lo, hi = plan.intervals[:, 0::2], plan.intervals[:, 1::2]  # (G, 3, Sq)
    lo, hi = (torch.where(tested[:, None], x, other) for x, other in ((lo, 0), (hi, LARGEST + 1)))

    def of_blocks(x: torch.Tensor, block: torch.Tensor, blocks: int, reduce: str) -> torch.Tensor:
        room = x.new_zeros(*x.shape[:-1], blocks)
        return room.scatter_reduce(-1, block.expand_as(x), x, reduce, include_self=False)

    Nq, Nk = len(plan.q_rows), len(plan.k_rows)
    lo, hi = of_blocks(lo, of_query, Nq, "amax"), of_blocks(hi, of_query, Nq, "amin")  # (G, 3, Nq)
    first, last = of_blocks(plan.coords, of_key, Nk, "amin"), of_blocks(plan.coords, of_key, Nk, "amax")  # (3, Nk)
    complete, ragged, _ = plan.ends.unbind(-1)
    position = torch.arange(plan.index.shape[-1], device=plan.device)
    inside = (position < complete[..., None]) | (position >= ragged[..., None])  # other runs are not looked at
    index = plan.index.long().clamp(0, Nk - 1)
    inside |= last[0][index] < 0  # text
    fits = torch.ones_like(inside)
    for axis in range(3):
        fits &= (first[axis][index] >= lo[:, axis, :, None]) & (last[axis][index] < hi[:, axis, :, None])
    return bool((inside | fits).all())
