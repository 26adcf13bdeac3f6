"""Triton kernel of ``reorder_tokens``: a program copies a few rows, or pieces of them, of up to four tensors.

    out[b, i] = x[b, order[i]]

Memory is copied as 32-bit words whatever the dtype, so that one compiled kernel serves all of them; as words of 16 or 8 bits
where a head, a stride or the start is no multiple of 4 bytes. A row is its H·D channels, cut into pieces regardless of where
heads begin, also where they lie apart: a number of heads that is no power of two leaves no thread idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

TENSORS = 4  # pointers that the kernel has room for


@triton.jit
def _load(ptr, batch, token, columns, mask, stride_b, stride_s, stride_h, W: tl.constexpr, HEAD: tl.constexpr):
    at = ptr + batch * stride_b + token * stride_s
    if HEAD == W:
        at = at + columns
    else:
        at = at + (columns // HEAD).to(tl.int64) * stride_h + columns % HEAD
    return tl.load(at, mask=mask)


@triton.jit
def reorder_kernel(
    order_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr,
    stride_b0, stride_s0, stride_h0, stride_b1, stride_s1, stride_h1,
    stride_b2, stride_s2, stride_h2, stride_b3, stride_s3, stride_h3,
    S_out,
    W: tl.constexpr, HEAD: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of ROWS tokens × pieces of a row, B). A row has W words, and each HEAD of them are contiguous.

    Neighbouring programs copy the pieces of the same rows. Absent pointers are None, from the end.
    """
    PIECES: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    batch = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) // PIECES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % PIECES) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    # Loaded as a vector: as a column it would be loaded once for each of a thread's four words.
    token = tl.load(order_ptr + rows, mask=rows < S_out, other=0)[:, None]
    rows = rows[:, None]
    mask = (rows < S_out) & (columns < W)
    # All loads come before the first store: the compiler cannot know that they do not overlap, and would wait in between.
    x0 = _load(x0_ptr, batch, token, columns, mask, stride_b0, stride_s0, stride_h0, W, HEAD)
    if x1_ptr is not None:
        x1 = _load(x1_ptr, batch, token, columns, mask, stride_b1, stride_s1, stride_h1, W, HEAD)
    if x2_ptr is not None:
        x2 = _load(x2_ptr, batch, token, columns, mask, stride_b2, stride_s2, stride_h2, W, HEAD)
    if x3_ptr is not None:
        x3 = _load(x3_ptr, batch, token, columns, mask, stride_b3, stride_s3, stride_h3, W, HEAD)
    out_at = (batch * S_out + rows) * W + columns
    tl.store(out0_ptr + out_at, x0, mask=mask)
    if x1_ptr is not None:
        tl.store(out1_ptr + out_at, x1, mask=mask)
    if x2_ptr is not None:
        tl.store(out2_ptr + out_at, x2, mask=mask)
    if x3_ptr is not None:
        tl.store(out3_ptr + out_at, x3, mask=mask)


def launch_config(words: int, tensors: int) -> dict[str, int]:
    """Tile and warps for rows of ``words`` words: pieces of 1 KiB, 4 to 8 accesses of 16 bytes a thread over all tensors.

    The usual rows (12, 24 or 40 heads of 256 bytes) are whole pieces. By the registers that the compiler reports, this keeps
    128 to 160 KiB in flight on each multiprocessor, several times what the latency of the memory asks for: a program waits for
    its part of the order first, and others have to hide that.
    """
    block = min(triton.next_power_of_2(words), 256)
    rows = max((8 if tensors == 1 else 4) * 256 // block, 1)
    return {"BLOCK_W": block, "ROWS": rows, "num_warps": 4}


def triton_reorder(
    tensors: Sequence[torch.Tensor], order: torch.Tensor, config: dict[str, int] | None = None
) -> list[torch.Tensor]:
    """Launch the kernel once for each size of a row. Arguments as in ``reorder_tokens``, which validates them."""
    order = order.contiguous()
    # A copy and not contiguous(), which leaves the stride of a single channel as it is.
    sources = [x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format) for x in tensors]
    outs = [x.new_empty((x.shape[0], len(order), *x.shape[2:])) for x in tensors]
    groups: dict[tuple[object, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for x, out in zip(sources, outs, strict=True):
        if out.numel():
            word = _word(x)
            x = x.view(word)
            groups.setdefault((word, *x.shape[2:]), []).append((x, out.view(word)))
    for group in groups.values():
        for first in range(0, len(group), TENSORS):
            _launch(group[first : first + TENSORS], order, config)
    return outs


def _word(x: torch.Tensor) -> torch.dtype:
    """The widest integer of at most 32 bits in which heads, strides and the start of ``x`` can be counted."""
    size = x.element_size()
    if size >= 4:
        return torch.int32
    lengths = (
        x.shape[3] * size,
        x.data_ptr(),
        x.storage_offset() * size,
        *(x.stride(axis) * size for axis in range(3)),
    )
    if all(length % 4 == 0 for length in lengths):
        return torch.int32
    return torch.int16 if size == 2 or all(length % 2 == 0 for length in lengths) else torch.int8


def _launch(pairs: list[tuple[torch.Tensor, torch.Tensor]], order: torch.Tensor, config: dict[str, int] | None) -> None:
    B, S_out, heads, depth = pairs[0][1].shape
    words = heads * depth
    together = all(heads == 1 or x.stride(2) == depth for x, _ in pairs)
    config = launch_config(words, len(pairs)) if config is None else config
    absent = [None] * (TENSORS - len(pairs))
    strides = [x.stride(axis) for x, _ in pairs for axis in range(3)] + [0, 0, 0] * len(absent)
    with torch.cuda.device_of(order):
        reorder_kernel[(triton.cdiv(S_out, config["ROWS"]) * triton.cdiv(words, config["BLOCK_W"]), B)](
            order, *(x for x, _ in pairs), *absent, *(out for _, out in pairs), *absent, *strides, S_out,
            W=words, HEAD=words if together else depth, **config,
        )  # fmt: skip
