"""FlexAttention with the same mask: in the layout's token order, or in raster order as published code runs it.

The block mask holds what ``create_block_mask`` would find (test_tables.py), but is counted a few rows of blocks at a
time: the whole mask of 171 360 tokens is 29 GB.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.peers import Call
from benchmarks.rows import Row, interval, units
from tilewise.kernels.plans.layout import Layout

BLOCK = 128
MaskMod = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
ORDERS = ("tile order", "raster order")


def mask_mod(row: Row, layout: Layout, order: str, device: torch.device) -> MaskMod:
    """The mask as FlexAttention takes it: from tables of coordinates in tile order, by arithmetic in raster order.

    Raises:
        ValueError: for rows with text, with windows that differ from head to head, or without a mask.
    """
    if row.grid.text or len(row.windows(layout)) > 1:
        raise ValueError(f"flex: {row.name!r} has text or several windows")
    window = row.windows(layout)[0]
    size, lengths = units(row, layout)
    # An axis that is visible as a whole needs no test.
    axes = [axis for axis in range(3) if window[axis] < lengths[axis]]
    if not axes:
        raise ValueError(f"flex: {row.name!r} sees everything and needs no mask")
    if order == "raster order":
        _, h, w = row.grid.shape
        parts = [(h * w, row.grid.t), (w, h), (1, w)]

        def by_arithmetic(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            tests = []
            for axis in axes:
                step, count = parts[axis]
                lo, hi = interval(q // step % count // size[axis], lengths[axis], window[axis], row.stride[axis])
                at = k // step % count // size[axis]
                tests += [at >= lo, at < hi]
            return functools.reduce(operator.and_, tests)

        return by_arithmetic
    if order != "tile order":
        raise ValueError(f"flex: order must be one of {ORDERS}, got {order!r}")
    tables = []
    for axis in axes:
        at = layout.coords[axis].to(device) // size[axis]
        bounds = interval(at, lengths[axis], window[axis], row.stride[axis])
        tables.append(tuple(x.to(torch.int32).contiguous() for x in (at, *bounds)))

    def by_tables(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        tests = [test for at, lo, hi in tables for test in (at[k] >= lo[q], at[k] < hi[q])]
        return functools.reduce(operator.and_, tests)

    return by_tables


def block_mask(mask: MaskMod, tokens: int, device: torch.device) -> BlockMask:
    """Full and partial 128 × 128 blocks of a mask over ``tokens`` queries and keys."""
    count = math.ceil(tokens / BLOCK)
    kept = torch.empty(count, count, dtype=torch.int64, device=device)
    keys = torch.arange(tokens, device=device)
    for block in range(count):
        queries = keys[block * BLOCK : (block + 1) * BLOCK]
        of_key = mask(None, None, queries[:, None], keys[None]).sum(0)
        kept[block] = torch.nn.functional.pad(of_key, (0, count * BLOCK - tokens)).view(count, BLOCK).sum(1)
    full = kept == BLOCK * BLOCK
    partial = (kept > 0) & ~full

    def lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort((~blocks).to(torch.uint8), dim=1, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(full), BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(tokens, tokens)
    )


def computed(mask: BlockMask) -> float:
    """Token pairs in listed blocks ÷ all pairs: what the kernel computes."""
    listed = int(mask.kv_num_blocks.sum())
    if mask.full_kv_num_blocks is not None:
        listed += int(mask.full_kv_num_blocks.sum())
    return listed * BLOCK * BLOCK / (mask.seq_lengths[0] * mask.seq_lengths[1])


@functools.cache
def _compiled() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def flex_call(mask: BlockMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, compiled: bool = True) -> Call:
    """The call that is timed. ``compiled=False`` is for tests: it makes all scores at once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    function: Any = _compiled() if compiled else flex_attention
    return lambda: function(q, k, v, block_mask=mask).transpose(1, 2)
