"""Keys and values of earlier windows of a long video, seen by every query of the window that is being made.

    | sink: first frames of the first window | previous: frames before the tail of the last one | the window's own |

At each call they are those of the same layer at the same forward of the earlier window, so that they have its noise level. They
keep the rotary positions that they had there. As in the cross-window attention of LOVECon (arXiv 2310.09711).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.runtime.attention_request import AttentionRequest

KV = tuple[torch.Tensor, torch.Tensor]  # key and value, (B, tokens, H, D) each
Place = tuple[int, int]  # number of the forward in its window, and of the layer


@dataclass
class EarlierKeys:
    """What one denoiser keeps of earlier windows, which all have the same forwards in the same order.

    sink: latent frames, the first of the first window. previous: latent frames of the last window, those before its last
    ``overlap`` ones, which are in the present window again.
    """

    sink: int
    previous: int
    overlap: int
    window: int = -1  # number of the one that is being made
    _forward: int = -1
    _first: dict[Place, KV] = field(default_factory=dict, repr=False)
    _last: dict[Place, KV] = field(default_factory=dict, repr=False)

    def begin_window(self) -> None:
        """The next forward is the first of another window."""
        self.window += 1
        self._forward = -1

    def begin(self) -> None:
        """Another forward of the window begins."""
        self._forward += 1

    def of_call(self, number: int, request: AttentionRequest, grid: Grid | None) -> KV | None:
        """What the queries of a call of layer ``number`` see besides, (B, n, Hk, D) each; None: nothing.

        Later windows get what this call has of the frames that are kept. grid: of the forward. Calls over other tokens than its
        video, and all or some of its text, have no frames.
        """
        if grid is None or not grid.video <= request.key.shape[1] <= grid.tokens or self.window < 0:
            return None
        place = self._forward, number
        found = [kept[place] for kept in (self._first, self._last) if place in kept]
        start = grid.with_text(request.key.shape[1] - grid.video).video_start
        frame = grid.h * grid.w

        def rows(first: int, end: int) -> slice:
            return slice(start + first * frame, start + end * frame)

        if self.window == 0 and self.sink:
            self._first[place] = _taken(request, rows(0, min(self.sink, grid.t)))
        end = grid.t - self.overlap
        first = max(end - self.previous, self.sink if self.window == 0 else 0)
        if self.previous and first < end:
            self._last[place] = _taken(request, rows(first, end))
        if not found:
            return None
        keys, values = zip(*found, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(x.nbytes for kept in (self._first, self._last) for both in kept.values() for x in both)

    def state(self) -> dict[str, torch.Tensor]:
        """All that is kept, by name; not copied."""
        return {
            f"{name}.{forward}.{number}.{part}": x
            for name, kept in (("first", self._first), ("last", self._last))
            for (forward, number), both in kept.items()
            for part, x in zip(("key", "value"), both, strict=True)
        }

    def load_state(self, window: int, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """What ``state`` gave after so many windows."""
        self.window, self._forward = window, -1
        for name, kept in (("first", self._first), ("last", self._last)):
            kept.clear()
            for at in {key.rpartition(".")[0] for key in tensors if key.startswith(f"{name}.")}:
                _, forward, number = at.split(".")
                kept[int(forward), int(number)] = tensors[f"{at}.key"].to(device), tensors[f"{at}.value"].to(device)


def _taken(request: AttentionRequest, rows: slice) -> KV:
    """Copies of some rows, by their places in the model's order."""
    key = request.key[:, rows] if request.qk_order is None else request.key[:, request.qk_order[1][rows]]
    copied = {"memory_format": torch.contiguous_format}
    return key.clone(**copied), request.value[:, rows].clone(**copied)


def seen_besides(request: AttentionRequest, earlier: KV) -> AttentionRequest:
    """A request, in the model's order, whose queries see further keys as well: behind its own, and whatever its mask says."""
    mask, (keys, values) = request.attn_mask, earlier
    if mask is not None:
        own, further = request.key.shape[1], keys.shape[1]
        mask = mask.expand(*mask.shape[:-1], own)  # a mask may have one column for all keys
        mask = F.pad(mask, (0, further), value=True if mask.dtype == torch.bool else 0.0)
    return request.replace(
        key=torch.cat([request.key, keys.to(request.key)], 1),
        value=torch.cat([request.value, values.to(request.value)], 1),
        attn_mask=mask,
    )
