"""Frames that come from outside, as latents: video in, for streams that change it.

Frames are encoded as they come (see ``streaming_encoder``: exact, with a cache in time). The last ones of a video that make no
whole latent are made up to one with copies of the last frame, and what is decoded of those is cut off: as many frames come out as
went in.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tilewise.pipelines.conditioning.inputs import fitted
from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.plugins.autoencoders.streaming import StreamingEncoder
from tilewise.plugins.errors import ConfigError, TilewiseError

LOOK = 0.05  # seconds between two looks at whether the stream is closed, while it waits for frames


class PushedFrames:
    """One thread pushes, another takes.

    Args:
        encoder: of one clip. space, vae: whose latents they are. device: that encodes.
        size: height and width of the stream in pixels; other frames are scaled to cover it, cut, and this is said once.
        factors: pixels to a latent along height and width, and frames to a latent frame but for the first one.
        more: where frames come from by themselves; None: ``push`` brings them.
    """

    def __init__(
        self,
        encoder: StreamingEncoder,
        space: LatentSpace,
        vae: Any,
        *,
        size: tuple[int, int],
        device: torch.device,
        factors: tuple[int, int],
        more: Iterable[NDArray[np.uint8]] | None = None,
    ) -> None:
        self.encoder, self.space, self.vae = encoder, space, vae
        self.size, self.device = size, device
        self.spatial, self.temporal = factors
        self._more: Iterator[NDArray[np.uint8]] | None = None if more is None else iter(more)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[NDArray[np.uint8], float]] = deque()  # frames, and when they came
        self._ended = self._said = False
        self._latents: torch.Tensor | None = None  # encoded, not taken
        self.first: NDArray[np.uint8] | None = None  # frame, (1, H, W, 3)
        self.frames = 0  # that came
        self._encoded = 0  # of them
        self.arrived = 0.0  # when the last frame came that was needed for what was taken; `time.perf_counter`

    def push(self, frames: NDArray[np.uint8]) -> None:
        """uint8 (F, H, W, 3), or one (H, W, 3).

        Raises ConfigError for others, TilewiseError after the end or where frames come by themselves.
        """
        if self._more is not None:
            raise TilewiseError("push_frames: this stream was given its video; give video=None to push frames")
        with self._changed:
            if self._ended:
                raise TilewiseError("push_frames: the video has ended")
            self._add(frames)
            self._changed.notify_all()

    def end(self) -> None:
        """There will be no more frames."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Frames that came and were not encoded."""
        return len(self._waiting)

    @property
    def length(self) -> int | None:
        """Frames of the whole video, once it has ended."""
        return self.frames if self._ended else None

    @torch.no_grad()
    def take(self, latents: int, between: Callable[[], None]) -> torch.Tensor:
        """The next latents, normalised (1, C, t, h, w) float32 with t of them or, at the end, fewer, down to none.

        between: called while it waits for frames; may raise.
        """
        while self._there < latents:
            count = 1 if self._encoded == 0 else self.encoder.group
            frames = self._next(count, between)
            if not frames:
                break
            self._encode(np.stack(frames + [frames[-1]] * (count - len(frames))), len(frames))
        if self._latents is None:
            height, width = (side // self.spatial for side in self.size)
            return torch.zeros(1, self.space.channels(self.vae), 0, height, width, device=self.device)
        taken, self._latents = self._latents[:, :, :latents], self._latents[:, :, latents:]
        return taken

    @property
    def latents(self) -> int | None:
        """Latent frames of the whole video, once it has ended."""
        return 1 + -(-(self.frames - 1) // self.temporal) if self._ended and self.frames else None

    @property
    def _there(self) -> int:
        return 0 if self._latents is None else self._latents.shape[2]

    def _next(self, count: int, between: Callable[[], None]) -> list[NDArray[np.uint8]]:
        """The next frames; fewer at the end."""
        with self._changed:
            while len(self._waiting) < count and not self._ended:
                if self._more is None:
                    between()
                    self._changed.wait(LOOK)
                elif (frames := next(self._more, None)) is None:
                    self._ended = True
                else:
                    self._add(frames)
            taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        if taken:
            self.arrived = taken[-1][1]
        return [frame for frame, _ in taken]

    def _encode(self, frames: NDArray[np.uint8], real: int) -> None:
        """real: how many of them are frames of the video."""
        video = torch.from_numpy(frames).to(self.device).permute(3, 0, 1, 2)[None]
        own = self.encoder.encode((video.float() / 127.5 - 1).to(self.vae.dtype)).float()
        mean, std = self.space.statistics(self.vae, own)
        own = (own - mean) / std
        kept = own.shape[2] if self._encoded == 0 else -(-real // self.temporal)
        self._encoded += real
        own = own[:, :, :kept]
        self._latents = own if self._latents is None else torch.cat([self._latents, own], 2)

    def _add(self, frames: NDArray[np.uint8]) -> None:
        array = np.asarray(frames)
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape[1:]:
            raise ConfigError(
                f"push_frames: needs uint8 frames of shape (F, height, width, 3), got {np.asarray(frames).shape} of {array.dtype}"
            )
        height, width = self.size
        if array.shape[1:3] != self.size:
            if not self._said:
                self._said = True
                warnings.warn(
                    f"stream: frames of {array.shape[1]}×{array.shape[2]} are scaled and cut to the stream's {height}×{width}",
                    stacklevel=4,
                )
            array = np.stack([np.asarray(fitted(Image.fromarray(frame), height, width)) for frame in array])
        now = time.perf_counter()
        if self.first is None and len(array):
            self.first = array[:1]
        self._waiting.extend((frame, now) for frame in array)
        self.frames += len(array)
