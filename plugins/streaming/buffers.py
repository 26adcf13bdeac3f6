"""The keys and values of a cache: two buffers of fixed shape for all layers and lanes, and masters of the frames that are kept.

    buffers   (lanes, layers, B, (M + W) · tokens, H, D)    keys turned to their position, stored as ``storage`` says
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
from tilewise.plugins.streaming.cache_plan import CachePlan
from tilewise.plugins.streaming.storage import rows_of


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
        plan: sizes. Memory and sink come first.
        frame_of_row: (c, tokens) int64, which frame of its chunk each row belongs to, where chunks of c frames are stored in tile
            order; None: rows are in raster order.
    """

    def __init__(
        self, plan: CachePlan, rotary: Rotary, *, device: Any, frame_of_row: torch.Tensor | None = None
    ) -> None:
        shape, memory, sink, averages = plan.shape, plan.memory, plan.sink, plan.averages
        self.shape = shape
        self.rotary = rotary
        self.memory = memory
        self.sink = sink
        self.frame_of_row = frame_of_row
        lead = (shape.lanes, shape.layers, shape.batch)
        self.key, self.value = rows_of(plan, device)
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
            for stored in (self.key, self.value):
                stored.move(self.rows(source), self.rows(target))

    def extend(
        self, lane: int, layer: int, slots: range, start: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk's keys and values of one layer, (B, S, H, D), and return all that it sees. slots: of the chunk. start:
        the first row that is seen."""
        own = self.rows(slots)
        return self.key.extend(lane, layer, own, start, key), self.value.extend(lane, layer, own, start, value)

    # ── frames, keys not turned ──────────────────────────────────────────────────────────────────────────────────

    def read(self, slots: Sequence[int], frames: Sequence[int]) -> Frames:
        """Frames of the window that stand in ``slots``, turned back from the positions ``frames``."""
        lead, dims = self.time.shape[:3], (self.shape.tokens, self.shape.heads, self.shape.head_dim)
        key, value = (self.time.new_empty((*lead, len(slots), *dims)) for _ in range(2))
        for i, slot in enumerate(slots):
            rows = self.rows(range(slot, slot + 1))
            key[:, :, :, i] = self.key.read(rows, key.dtype)
            value[:, :, :, i] = self.value.read(rows, value.dtype)
        turning = key[..., : self.shape.time_channels]
        turning.copy_(rotate(turning, *self._tables(frames, key.device), back=True))
        return Frames(key, value)

    def read_kept(self, frames: range) -> Frames:
        """Frames of memory and sink, by their place in them."""
        at = slice(frames.start, frames.stop)
        time = self.shape.time_channels
        if self.rest is not None and self.kept_value is not None:
            rest, value = self.rest[:, :, :, at], self.kept_value[:, :, :, at].clone()
        else:
            key, value = (self._frames(one.read(self._kept(frames), self.time.dtype)) for one in (self.key, self.value))
            rest = key[..., time:]
        return Frames(torch.cat([self.time[:, :, :, at], rest], -1), value)

    def write_kept(self, frames: range, new: Frames) -> None:
        """Set masters and values of frames of memory and sink; keys are turned by the next ``place``."""
        at = slice(frames.start, frames.stop)
        time = self.shape.time_channels
        self.time[:, :, :, at] = new.key[..., :time]
        self.key.write(self._kept(frames), new.key[..., time:].flatten(3, 4), slice(time, None))
        self.value.write(self._kept(frames), new.value.flatten(3, 4))
        if self.rest is not None and self.kept_value is not None:
            self.rest[:, :, :, at] = new.key[..., time:]
            self.kept_value[:, :, :, at] = new.value

    def place(self, kept: range, positions: Sequence[int]) -> None:
        """Turn the keys of frames of memory and sink to ``positions``, from their masters."""
        time = self.shape.time_channels
        turned = rotate(self.time[:, :, :, kept.start : kept.stop], *self._tables(positions, self.time.device))
        self.key.write(self._kept(kept), turned.flatten(3, 4), slice(0, time))

    def _kept(self, frames: range) -> slice:
        """Rows of frames of memory and sink."""
        return slice(frames.start * self.shape.tokens, frames.stop * self.shape.tokens)

    def _frames(self, rows: torch.Tensor) -> torch.Tensor:
        """(lanes, layers, B, frames · tokens, H, d) as (lanes, layers, B, frames, tokens, H, d)."""
        return rows.unflatten(3, (-1, self.shape.tokens))

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
        stored = {"key": self.key, "value": self.value}
        found = {name + more: tensor for name, rows in stored.items() for more, tensor in rows.tensors().items()}
        return found | self._masters()

    def _masters(self) -> dict[str, torch.Tensor]:
        masters = {"time": self.time, "rest": self.rest, "kept_value": self.kept_value}
        return {name: tensor for name, tensor in masters.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take on the device."""
        return self.key.nbytes + self.value.nbytes + sum(tensor.nbytes for tensor in self._masters().values())


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
