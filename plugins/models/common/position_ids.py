"""The grid of an image whose tokens come packed, (B, S, C), with a position each: Flux, Flux.2, Chroma and their like.

Positions are rows of (image number, row, column, …). The image being made comes first, in raster order; other image numbers
after it are reference images. Where a row ends is in the values alone, so they are read on the host: once for each tensor, as
pipelines pass the same one at every step. For torch.compile this is a custom operator with unbacked sizes.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from tilewise.kernels.device import CUDAGRAPH_UNSAFE, capturing
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.models.common.family import UnreadableGridError
from tilewise.plugins.torch_compat import version_of

# positions → (their version, how many were passed over, the shape or the error message)
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def image_shape(ids: torch.Tensor, skip: int = 0) -> tuple[int, int, int]:
    """(h, w, others): the tokens of the image that ``ids`` (S, ≥ 3) or (B, S, ≥ 3) begins with, and those after it, S − h·w.

    skip: tokens before the image, of text.

    Raises:
        UnreadableGridError: where the first tokens are not an image in raster order.
        TilewiseError: when their values cannot be read because a CUDA graph is being captured.
    """
    if torch.compiler.is_dynamo_compiling():
        rows, columns, others = torch.ops.tilewise.image_shape(ids, skip)
        return rows, columns, others
    return _image_shape(ids, skip)


@torch.library.custom_op("tilewise::image_shape", mutates_args=(), **CUDAGRAPH_UNSAFE)
def _operator(ids: torch.Tensor, skip: int) -> tuple[int, int, int]:
    return _image_shape(ids, skip)


@_operator.register_fake
def _(ids, skip):
    size = torch.library.get_ctx().new_dynamic_size
    return size(min=1), size(min=1), size(min=0)


def _image_shape(ids: torch.Tensor, skip: int) -> tuple[int, int, int]:
    version = version_of(ids)  # None: whether it changed is not known, so it is read each time
    known = _read.get(ids)
    if known is not None and version is not None and known[:2] == (version, skip):
        if isinstance(known[2], str):
            raise UnreadableGridError(known[2])
        return known[2]
    if capturing(ids.device):
        raise TilewiseError(
            "the positions of the image tokens cannot be read while a CUDA graph is being captured; run the denoiser once with "
            "the same img_ids first"
        )
    try:
        shape = read_image_shape(ids.detach()[..., skip:, :].cpu())
    except UnreadableGridError as error:
        _read[ids] = (version, skip, str(error))
        raise
    _read[ids] = (version, skip, shape)
    return shape


def read_image_shape(ids: torch.Tensor) -> tuple[int, int, int]:
    """``image_shape`` of positions on the CPU, from their values alone."""
    if ids.ndim == 3:
        ids = ids[0]
    number, row, column = ids[:, 0], ids[:, 1], ids[:, 2]
    tokens = _run(number)
    columns = _run(row[:tokens])
    rows = tokens // columns
    # Positions may have been rounded: half precision does not hold every integer above 256 (bfloat16) or 2048.
    expected_row = torch.arange(rows) + int(row[0])
    expected_column = torch.arange(columns) + int(column[0])
    in_raster_order = (
        rows * columns == tokens
        and torch.equal(row[:tokens].view(rows, columns), expected_row.to(row.dtype)[:, None].expand(rows, columns))
        and torch.equal(column[:tokens].view(rows, columns), expected_column.to(row.dtype).expand(rows, columns))
    )
    if not in_raster_order:
        raise UnreadableGridError(
            f"img_ids: the first {tokens} tokens are not an image in raster order, so windows cannot be laid over it"
        )
    return rows, columns, len(row) - tokens


def _run(values: torch.Tensor) -> int:
    """How many of the first values are equal."""
    different = (values != values[0]).nonzero()
    return int(different[0, 0]) if len(different) else len(values)
