"""How the numbers of a cache's frames are stored: as the model has them, or in 8 bits.

fp8: each row of a head, x (D,), is stored as float8_e4m3fn numbers with one scale, a power of two as in the MX formats (Open
Compute Project, Microscaling Formats v1.0), whose exponent takes a byte:

    e = ⌈log2(max |x| / 448)⌉,    x8 = fp8(x · 2^−e),    x̂ = x8 · 2^e,    |x̂ − x| ≤ max(2^−4 · |x|, 2^−10 · 2^e)

448 is the largest number of the type. A row is the smallest part that is written at once, so that nothing is ever scaled anew. A
power of two loses nothing, as these are floating-point numbers: x̂ is exact in bfloat16, and storing x̂ again gives x̂. Of a key the
channels that turn with time have a scale of their own: a key of the sink that is turned anew leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tilewise.plugins.streaming.cache_plan import CachePlan

EIGHT_BITS = torch.float8_e4m3fn
LARGEST = 448  # = 0.875 · 2^9


class Rows(Protocol):
    """(lanes, layers, B, rows, H, D) numbers of all layers and lanes.

    Attributes:
        data: as they are stored.
    """

    data: torch.Tensor

    def read(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """A copy (lanes, layers, B, n, H, D) of some rows."""

    def write(self, rows: slice, new: torch.Tensor, channels: slice = slice(None)) -> None:
        """Set channels of some rows, (lanes, layers, B, n, H, d); where there are scales, those of whole groups."""

    def move(self, source: slice, target: slice) -> None:
        """Copy rows to other rows, as they are stored."""

    def extend(self, lane: int, layer: int, own: slice, start: int, new: torch.Tensor) -> torch.Tensor:
        """Write a chunk's rows ``own`` of one layer, (B, n, H, D), and return the layer's from ``start`` to them, in the model's
        dtype; the chunk's own as they are."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name, not copied; "" is ``data``."""

    @property
    def nbytes(self) -> int:
        """Memory on the device."""


class PlainRows:
    """``Rows`` in the model's dtype: nothing is copied on reading."""

    def __init__(self, size: Sequence[int], dtype: torch.dtype, device: Any) -> None:
        self.data = torch.zeros(*size, dtype=dtype, device=device)

    def read(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        return self.data[:, :, :, rows].to(dtype, copy=True)

    def write(self, rows: slice, new: torch.Tensor, channels: slice = slice(None)) -> None:
        self.data[:, :, :, rows, :, channels] = new

    def move(self, source: slice, target: slice) -> None:
        self.data[:, :, :, target] = self.data[:, :, :, source]

    def extend(self, lane: int, layer: int, own: slice, start: int, new: torch.Tensor) -> torch.Tensor:
        self.data[lane, layer, :, own].copy_(new)
        return self.data[lane, layer, :, start : own.stop]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"": self.data}

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class EightBitRows:
    """``Rows`` in fp8. A layer's are brought to the model's dtype in one buffer, which all layers and lanes use in turn.

    Args:
        groups: channels that share a scale, one after another.
    """

    def __init__(self, size: Sequence[int], groups: Sequence[slice], dtype: torch.dtype, device: Any) -> None:
        self.groups = list(groups)
        self.data = torch.zeros(*size, dtype=EIGHT_BITS, device=device)
        self.exponents = torch.zeros(*size[:-1], len(self.groups), dtype=torch.int8, device=device)
        self._layer = torch.zeros(*size[2:], dtype=dtype, device=device)

    def read(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        out = self.data[:, :, :, rows].to(dtype)
        self._scale(out, self.exponents[:, :, :, rows])
        return out

    def write(self, rows: slice, new: torch.Tensor, channels: slice = slice(None)) -> None:
        self._store((slice(None), slice(None), slice(None), rows), new, range(*channels.indices(self.data.shape[-1])))

    def move(self, source: slice, target: slice) -> None:
        for stored in (self.data, self.exponents):
            stored[:, :, :, target] = stored[:, :, :, source]

    def extend(self, lane: int, layer: int, own: slice, start: int, new: torch.Tensor) -> torch.Tensor:
        self._store((lane, layer, slice(None), own), new, range(self.data.shape[-1]))
        before = self._layer[:, start : own.start]
        before.copy_(self.data[lane, layer, :, start : own.start])
        self._scale(before, self.exponents[lane, layer, :, start : own.start])
        self._layer[:, own].copy_(new)
        return self._layer[:, start : own.stop]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"": self.data, "_exponents": self.exponents}

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.exponents.nbytes + self._layer.nbytes

    def _store(self, at: tuple[Any, ...], new: torch.Tensor, channels: range) -> None:
        """``new`` (…, H, d) into the channels ``channels`` of the rows ``at``, group by group."""
        for number, group in enumerate(self.groups):
            if group.start < channels.start or group.stop > channels.stop:
                continue
            part = new[..., group.start - channels.start : group.stop - channels.start].float()
            exponent = exponent_of(part.abs().amax(-1))
            self.exponents[(*at, ..., number)] = exponent.to(torch.int8)
            self.data[(*at, ..., group)] = (part * power_of_two(-exponent)[..., None]).to(EIGHT_BITS)

    def _scale(self, numbers: torch.Tensor, exponents: torch.Tensor) -> None:
        """Multiply stored numbers (…, H, D) by their scales, in place."""
        for number, group in enumerate(self.groups):
            scale = power_of_two(exponents[..., number].to(torch.int32))
            numbers[..., group] *= scale[..., None].to(numbers.dtype)


def exponent_of(largest: torch.Tensor) -> torch.Tensor:
    """e (…) int32 of the largest magnitude of a row, float32: the least with largest ≤ 448 · 2^e. Within what a byte holds."""
    mantissa, exponent = torch.frexp(largest)  # in [0.5, 1), largest = mantissa · 2^exponent
    return (exponent.to(torch.int32) - 8 - (mantissa <= 0.875).to(torch.int32)).clamp(-120, 120)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^e (…) float32 of e int32 in −126 … 127, exact on every device: the exponent bits themselves."""
    return ((exponent + 127) << 23).view(torch.float32)


def rows_of(plan: CachePlan, device: Any) -> tuple[Rows, Rows]:
    """Empty keys and values of a cache."""
    shape = plan.shape
    rows = (plan.memory + plan.window) * shape.tokens
    size = (shape.lanes, shape.layers, shape.batch, rows, shape.heads, shape.head_dim)
    if plan.storage == "model":
        return PlainRows(size, shape.dtype, device), PlainRows(size, shape.dtype, device)
    turning = [slice(0, shape.time_channels), slice(shape.time_channels, shape.head_dim)]
    return (
        EightBitRows(size, turning, shape.dtype, device),
        EightBitRows(size, [slice(0, shape.head_dim)], shape.dtype, device),
    )
