"""The keys and values of a cache: two buffers of fixed shape for all layers and lanes, and masters of the frames that are kept.

    buffers   (lanes, layers, B, (M + W) · tokens, H, D)    in the model's dtype, keys turned to their position
    masters   (lanes, layers, B, (M + S) · tokens, H, …)    float32, keys not turned with time

A key of the ring is turned once, when it is written, at its absolute position. Sink and memory move with the window: once a chunk
they are turned from their master to where they stand now. Turning what was turned before would add up rounding errors
(5.5 % after 100 chunks). Rows and columns do not move, so the master has the channels of t alone, unless the policy averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.plugins.models.common.rotary import Rotary, rotate
from tilewise.plugins.streaming.kv_cache import CacheShape


@dataclass(frozen=True)
class Frames:
    """Keys and values of some latent frames, all layers and lanes: (lanes, layers, B, frames, tokens, H, D), the keys not turned
    with time. In the masters' dtype."""

    key: torch.Tensor
    value: torch.Tensor

    def __len__(self) -> int:
        return self.key.shape[3]

    def take(self, frames: slice) -> Frames:
        """Some of the frames, as views."""
        return Frames(self.key[:, :, :, frames], self.value[:, :, :, frames])


class Buffers:
    """See above.

    Args:
        shape: sizes. kept: frames of memory and sink together, which come first. window: frames of the window, sink included.
        sink: frames of the sink.
        averages: keep keys and values of sink and memory whole in the masters, as the policy changes them little by little.
        frame_of_row: (c, tokens) int64, which frame of its chunk each row belongs to, where chunks of c frames are stored in tile
            order; None: rows are in raster order.
    """

    def __init__(
        self, shape: CacheShape, rotary: Rotary, *, window: int, sink: int, memory: int, averages: bool, device: Any,
        frame_of_row: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.rotary = rotary
        self.memory = memory
        self.sink = sink
        self.averages = averages
        self.frame_of_row = frame_of_row
        lead = (shape.lanes, shape.layers, shape.batch)
        size = (*lead, (memory + window) * shape.tokens, shape.heads, shape.head_dim)
        self.key = torch.zeros(size, dtype=shape.dtype, device=device)
        self.value = torch.zeros(size, dtype=shape.dtype, device=device)
        kept = (*lead, memory + sink, shape.tokens, shape.heads)
        master: dict[str, Any] = {"dtype": shape.master_dtype, "device": device}
        self.time = torch.zeros(*kept, shape.time_channels, **master)
        self.rest = torch.zeros(*kept, shape.head_dim - shape.time_channels, **master) if averages else None
        self.kept_value = torch.zeros(*kept, shape.head_dim, **master) if averages else None

    # ── rows of the buffers ──────────────────────────────────────────────────────────────────────────────────────

    def rows(self, slots: range) -> slice:
        """Rows of consecutive slots of the window."""
        return slice((self.memory + slots.start) * self.shape.tokens, (self.memory + slots.stop) * self.shape.tokens)

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Copy frames from slot to slot, in runs of neighbours."""
        for source, target in _runs(moves):
            for buffer in (self.key, self.value):
                buffer[:, :, :, self.rows(target)] = buffer[:, :, :, self.rows(source)]

    # ── frames, keys not turned ──────────────────────────────────────────────────────────────────────────────────

    def read(self, slots: Sequence[int], frames: Sequence[int]) -> Frames:
        """Frames of the window that stand in ``slots``, turned back from the positions ``frames``."""
        keys, values = [], []
        for slot in slots:
            rows = self.rows(range(slot, slot + 1))
            keys.append(self.key[:, :, :, rows].to(self.shape.master_dtype))
            values.append(self.value[:, :, :, rows].to(self.shape.master_dtype))
        key, value = torch.stack(keys, 3), torch.stack(values, 3)
        time = self.shape.time_channels
        turned = rotate(key[..., :time], *self._tables(frames, key.device), back=True)
        return Frames(torch.cat([turned, key[..., time:]], -1), value)

    def read_kept(self, frames: range) -> Frames:
        """Frames of memory and sink, by their place in them."""
        at = slice(frames.start, frames.stop)
        time = self.shape.time_channels
        if self.rest is not None and self.kept_value is not None:
            rest, value = self.rest[:, :, :, at], self.kept_value[:, :, :, at]
        else:
            rest = self._kept(self.key, frames)[..., time:].to(self.shape.master_dtype)
            value = self._kept(self.value, frames).to(self.shape.master_dtype)
        return Frames(torch.cat([self.time[:, :, :, at], rest], -1), value.clone())

    def write_kept(self, frames: range, new: Frames) -> None:
        """Set masters and values of frames of memory and sink; keys are turned by the next ``place``."""
        at = slice(frames.start, frames.stop)
        time = self.shape.time_channels
        self.time[:, :, :, at] = new.key[..., :time]
        self._kept(self.key, frames)[..., time:] = new.key[..., time:].to(self.shape.dtype)
        self._kept(self.value, frames).copy_(new.value)
        if self.rest is not None and self.kept_value is not None:
            self.rest[:, :, :, at] = new.key[..., time:]
            self.kept_value[:, :, :, at] = new.value

    def place(self, kept: range, positions: Sequence[int]) -> None:
        """Turn the keys of frames of memory and sink to ``positions``, from their masters."""
        time = self.shape.time_channels
        turned = rotate(self.time[:, :, :, kept.start : kept.stop], *self._tables(positions, self.key.device))
        self._kept(self.key, kept)[..., :time] = turned.to(self.shape.dtype)

    def _kept(self, buffer: torch.Tensor, frames: range) -> torch.Tensor:
        """A view (lanes, layers, B, frames, tokens, H, D) of frames of memory and sink in a buffer."""
        rows = slice(frames.start * self.shape.tokens, frames.stop * self.shape.tokens)
        return buffer[:, :, :, rows].unflatten(3, (len(frames), self.shape.tokens))

    def _tables(self, frames: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for (…, frames, tokens, H, d_t)."""
        angles = self.rotary.time_angles(frames)[:, None]
        if self.frame_of_row is not None:
            angles = angles.unflatten(0, (-1, len(self.frame_of_row)))[:, self.frame_of_row, 0].flatten(0, 1)
        cos, sin = (x.to(self.shape.master_dtype).to(device, non_blocking=True) for x in (angles.cos(), angles.sin()))
        return cos[:, :, None], sin[:, :, None]

    # ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, not copied."""
        found = {
            "key": self.key,
            "value": self.value,
            "time": self.time,
            "rest": self.rest,
            "kept_value": self.kept_value,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _runs(moves: Iterable[tuple[int, int]]) -> Iterable[tuple[range, range]]:
    """(source, target) pairs as ranges, as long as neighbours move together."""
    run: list[tuple[int, int]] = []
    for pair in sorted(moves):
        if run and pair != (run[-1][0] + 1, run[-1][1] + 1):
            yield _ranges(run)
            run = []
        run.append(pair)
    if run:
        yield _ranges(run)


def _ranges(run: list[tuple[int, int]]) -> tuple[range, range]:
    (first, to), (last, _) = run[0], run[-1]
    return range(first, last + 1), range(to, to + len(run))
