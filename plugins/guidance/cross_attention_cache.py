"""What the global path's cross-attention gave, kept between two refreshes: on the device up to a budget, the rest in
pinned host memory, copied while other work runs.

At 1088×1920×81 one branch of Wan 1.3B is 30 layers of 171 360 × 1536 bfloat16: 15.8 GB. Tensors are kept as they are, to the bit.
A copy to the host runs on a stream of its own behind the work that made the tensor; the way back begins one layer ahead of its
use (``prefetch``), which at this size takes a fraction of that layer's attention.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from tilewise.plugins.errors import TilewiseError

Key = tuple[Hashable, int]  # branch and layer
P = ParamSpec("P")
T = TypeVar("T")


def _locked(
    method: Callable[Concatenate[CrossAttentionCache, P], T],
) -> Callable[Concatenate[CrossAttentionCache, P], T]:
    @functools.wraps(method)
    def call(self: CrossAttentionCache, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class CrossAttentionCache:
    """Tensors by (branch, layer). Threads may share it, and its budgets.

    Args:
        device_bytes: most bytes kept on the device; None: no limit.
        host_bytes: most bytes kept in host memory; None: no limit.

    What is asked for again must be asked for in the order of layers for ``prefetch`` to help; any other order works.
    """

    def __init__(self, device_bytes: int | None = None, host_bytes: int | None = None) -> None:
        self.device_bytes = device_bytes
        self.host_bytes = host_bytes
        self.on_device = 0
        self.on_host = 0
        self._near: dict[Key, torch.Tensor] = {}
        self._far: dict[Key, torch.Tensor] = {}
        self._left: dict[Key, Any] = {}  # event: the copy to the host is done
        self._coming: dict[Key, tuple[torch.Tensor, Any]] = {}  # being copied back, and the event that says it is there
        self._stream: Any = None
        # Held for the bookkeeping, not for the copies, which run on a stream.
        self._lock = threading.RLock()

    @_locked
    def put(self, key: Key, value: torch.Tensor) -> None:
        """Keep a tensor in place of what the key held.

        Raises:
            TilewiseError: if neither budget has room for it.
        """
        size = value.numel() * value.element_size()
        self._coming.pop(key, None)
        old = self._near.pop(key, None)
        if old is not None:
            self.on_device -= old.numel() * old.element_size()
        room = key in self._far and self._far[key].shape == value.shape and self._far[key].dtype == value.dtype
        if not room and (self.device_bytes is None or self.on_device + size <= self.device_bytes):
            self._forget_far(key)
            self._near[key] = value
            self.on_device += size
            return
        if not room:
            self._forget_far(key)
            if self.host_bytes is not None and self.on_host + size > self.host_bytes:
                raise TilewiseError(
                    f"two paths: the cross-attention cache is full: {self.on_device / 2**30:.1f} GiB on the device and "
                    f"{self.on_host / 2**30:.1f} GiB in host memory are used, and layer {key[1]} needs {size / 2**30:.2f} GiB "
                    "more. Give a larger budget, or refresh=1, which keeps nothing"
                )
            self._far[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.on_host += size
        self._copy_out(key, value)

    @_locked
    def get(self, key: Key, device: torch.device) -> torch.Tensor | None:
        """The tensor of a key on ``device``, not to be written to; None if there is none."""
        if key in self._near:
            return self._near[key]
        if key not in self._far:
            return None
        self.prefetch(key, device)
        if key not in self._coming:  # on a CPU, where host memory is the device's own
            return self._far[key].to(device)
        value, there = self._coming.pop(key)
        current = torch.cuda.current_stream(device)
        current.wait_event(there)
        value.record_stream(current)
        return value

    @_locked
    def prefetch(self, key: Key, device: torch.device) -> None:
        """Begin to bring a tensor back to the device, behind whatever copy is under way."""
        if device.type != "cuda" or key not in self._far or key in self._coming:
            return
        stream = self._copies(device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._left[key])
            value = self._far[key].to(device, non_blocking=True)
            there = torch.cuda.Event()
            there.record(stream)
        self._coming[key] = value, there

    @_locked
    def drop(self, branch: Hashable) -> None:
        """Forget everything of a branch."""
        for key in [key for key in self._near if key[0] == branch]:
            gone = self._near.pop(key)
            self.on_device -= gone.numel() * gone.element_size()
        for key in [key for key in self._far if key[0] == branch]:
            self._forget_far(key)

    def _forget_far(self, key: Key) -> None:
        self._coming.pop(key, None)
        if key in self._left:
            self._left.pop(key).synchronize()  # before pinned memory that is being written to is given to somebody else
        gone = self._far.pop(key, None)
        if gone is not None:
            self.on_host -= gone.numel() * gone.element_size()

    def _copy_out(self, key: Key, value: torch.Tensor) -> None:
        if not value.is_cuda:
            self._far[key].copy_(value)
            return
        stream = self._copies(value.device)
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            self._far[key].copy_(value, non_blocking=True)
            value.record_stream(stream)  # its memory is not given away before it is read
            done = torch.cuda.Event()
            done.record(stream)
        self._left[key] = done

    def _copies(self, device: torch.device) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
