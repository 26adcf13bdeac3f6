"""A video that comes out while it is made: an iterator of finished frames, and its controls."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.streaming.decoding import FrameDecoder, PendingFrames
from tilewise.pipelines.streaming.pushed import PushedFrames
from tilewise.pipelines.streaming.source import ChunkSource
from tilewise.pipelines.streaming.state import StreamState, restore, state_of
from tilewise.plugins.errors import ConfigError, TilewiseError


@dataclass(frozen=True)
class Chunk:
    """Some finished frames of a stream.

    frames: uint8 (F, H, W, 3), in host memory. first_frame: number of the first of them in the video.
    latents: (1, C, t, h, w) float32, normalised, on the device. first_latent: number of its first latent frame.
    prompt: the one that it was made with.
    stats: "denoise" and "decode" seconds of the host's clock that the chunk took from its begin to its latents and from those to
    its frames, "wait" until it was asked for, and "fps" since the stream began; of a video that is changed "latency", from the
    last pushed frame that the chunk needed to its own frames.
    """

    frames: NDArray[np.uint8]
    first_frame: int
    latents: torch.Tensor
    first_latent: int
    prompt: str
    stats: dict[str, float]


@dataclass
class _UnderWay:
    latents: torch.Tensor
    first_latent: int
    prompt: str
    frames: PendingFrames
    begun: float
    denoised: float
    arrived: float | None = None  # when the last pushed frame came that it needed


class _ClosedError(Exception):
    """Ends a chunk whose stream another thread closes."""


class VideoStream(Iterator[Chunk]):
    """Made by ``stream``. Iterate over it, or use it as a context manager and call ``next``; both close it in the end.

    Whatever happens, an exception, Ctrl-C or a ``close`` from another thread in the middle of a chunk included, ``close`` leaves
    the pipeline as it was before.

    Args:
        source: of its latents. decoder: see there.
        frames: of the video; None: without end.
        close: takes everything off the pipeline again. ahead: chunks that are begun before the one before is read; 0 on a CPU.
        beside: make chunks in a thread of their own, each from when the one before has its latents: its decoding, and what is
            done with its frames, run beside the next one's passes.
        temporal: frames a latent frame, but for the first one.
    """

    def __init__(
        self,
        source: ChunkSource,
        decoder: FrameDecoder,
        *,
        frames: int | None,
        fps: float,
        close: Callable[[], None],
        ahead: int,
        temporal: int,
        beside: bool = False,
    ) -> None:
        self.recipe = source.recipe
        self.fps = fps
        self.frames = frames
        self.source, self.decoder, self.prompts = source, decoder, source.prompts
        self._most = frames
        self._ahead, self._temporal = ahead, temporal
        # One thread for all chunks: methods and step caches keep what they know of a run by thread.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tilewise-stream") if beside else None
        self._task: Future[None] | None = None  # the chunk that it makes
        self._close: Callable[[], None] | None = close
        self.under_way: list[_UnderWay] = []
        self.chunks = 0  # begun
        self.frames_out = 0
        self._frames_before = 0  # by a stream that this one goes on from
        self._first_begin: float | None = None
        self._running = threading.Event()
        self._running.set()
        self._closing = False
        self._working = threading.RLock()  # held while a chunk is made, and while the pipeline is put back

    # ── the iterator ─────────────────────────────────────────────────────────────────────────────────────────────

    def __next__(self) -> Chunk:
        """The next finished frames.

        Raises:
            StopIteration: the video has its length, or the stream is closed.
        """
        self._running.wait()
        with self._working:
            if self._close is None or (self.frames is not None and self.frames_out >= self.frames):
                self.close()
                raise StopIteration
            try:
                # The first frames are waited for: launching the next chunk before them would take as long again.
                ahead = self._ahead if self.chunks else 0
                while True:
                    if self._worker is not None:
                        self._begin_beside(self._worker)
                    while self._worker is None and len(self.under_way) <= ahead and not self._enough_begun():
                        self._begin_chunk()
                    if not self.under_way:  # a decoder that leaves an incomplete group of latents out at the end
                        self.close()
                        raise StopIteration
                    made = self._finish_chunk()
                    if len(
                        made.frames
                    ):  # decoders that are not exact may keep all frames of a short chunk for the next
                        return made
            except StopIteration:
                raise
            except _ClosedError:
                raise StopIteration from None
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_close", None) is not None:
            self.close()

    def close(self) -> None:
        """End the stream and leave the pipeline as it was. Twice does no harm.

        A chunk that another thread is making is waited for up to its next pass and dropped there; that thread's iteration ends.
        """
        self._closing = True
        self._running.set()
        with self._working:
            close, self._close = self._close, None
            if self._task is not None:
                wait([self._task])
                self._task = None
            if self._worker is not None:
                self._worker.shutdown(wait=False)
            self.under_way.clear()
            if close is not None:
                close()

    # ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def prompt(self) -> str:
        """What the next chunk will be made with, if no change is waiting."""
        return self.prompts.prompt

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Memory that the KV caches take, known before the first chunk: "latent": of one latent frame, "total": of all.
        Windows of a bidirectional model have none."""
        return self.source.cache_bytes

    def set_prompt(self, prompt: str, how: str = "recache", over: int = 3, *, at: float | None = None) -> None:
        """Change the prompt from the next chunk that is begun on. Frames of the old one come out up to the chunk under way.

        Args:
            prompt: the new one. A change that was not yet applied is replaced.
            how: of a causal model, "recache": compute the keys and values of the last frames anew with it; the sink stays.
                "flush": forget all frames but the sink and the last two. "blend": go over to it in ``over`` chunks. With the
                cache policy ``shot``, the first two begin a new shot, whose first frames become the sink. Of windows the next
                one has it, and goes on from the same latents ("recache"), from the last two alone ("flush"), or goes over
                to it in ``over`` windows ("blend").
            at: seconds of the video; the change waits for the first chunk that begins then or later. Several changes may wait,
                and where two wait for one chunk the later one counts.

        Raises:
            ConfigError: an empty prompt, an unknown ``how``, a time that is past.
            TilewiseError: the stream is closed.
        """
        self._check_open("set_prompt")
        begun = self._frames_of(self.source.next_frame)
        if at is not None and not begun / self.fps <= at < math.inf:
            raise ConfigError(
                f"set_prompt: at={at!r} is past: frames up to {begun / self.fps:g} s of the video have been begun"
            )
        self.prompts.change(prompt, how, over, None if at is None else math.ceil(at * self.fps - 1e-6))

    def push_frames(self, frames: NDArray[np.uint8]) -> None:
        """More of the video that is changed: uint8 (F, H, W, 3), or one frame. Frames of another size are scaled and cut.

        Returns at once; ``frames_waiting`` says how many have not been begun. ``next`` waits for frames that another thread
        pushes, until ``end_frames``.

        Raises:
            ConfigError: frames of another kind.
            TilewiseError: the stream begins with noise, was given its video, or has got its end.
        """
        self._pushed("push_frames").push(frames)

    def end_frames(self) -> None:
        """The video that is pushed has no more frames. The stream ends with as many as came."""
        self._pushed("end_frames").end()

    @property
    def frames_waiting(self) -> int:
        """Pushed frames that have not been begun."""
        return 0 if self.source.pushed is None else self.source.pushed.waiting

    def _pushed(self, what: str) -> PushedFrames:
        if self.source.pushed is None:
            raise TilewiseError(
                f"{what}: this stream begins with noise; give stream(…, strength=0.6) to change a video"
            )
        return self.source.pushed

    def pause(self) -> None:
        """``next`` waits until another thread calls ``resume`` or ``close``. The chunk under way is finished."""
        self._running.clear()

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._running.set()

    def state_dict(self, *, small: bool = False) -> StreamState:
        """All that a stream needs to go on where this one is, for ``StreamState.save``.

        small: without the KV caches. They are computed anew from latents then, and what follows is alike and not equal.

        Raises:
            TilewiseError: the stream is closed.
        """
        self._check_open("state_dict")
        if self.source.pushed is not None:
            raise TilewiseError(
                "state_dict: a stream that changes a video has no state to go on from: its frames are elsewhere"
            )
        return state_of(self, small=small)

    def load_state_dict(self, state: StreamState) -> None:
        """Go on from a state, in a stream that was just made with the same checkpoint, recipe, size and cache.

        Raises:
            ConfigError: the state is of another kind of stream, or this one has begun.
            TilewiseError: the stream is closed.
        """
        self._check_open("load_state_dict")
        with torch.no_grad():
            restore(self, state)

    def finish_under_way(self) -> None:
        """Wait for the frames of the chunks that were begun."""
        if self._task is not None:
            task, self._task = self._task, None
            task.result()
        for one in self.under_way:
            one.frames.result()

    def go_on(
        self,
        chunks: int,
        frames_out: int,
        ready: list[tuple[torch.Tensor, torch.Tensor, int, str]],
    ) -> None:
        """Set where a stream is. ready: (frames, latents, number of the first one, prompt) of chunks that were not yet read."""
        self.chunks, self.frames_out = chunks, frames_out
        self._frames_before = frames_out
        now = time.perf_counter()
        self.under_way = [
            _UnderWay(latents, first, prompt, PendingFrames(frames, None, ()), now, now)
            for frames, latents, first, prompt in ready
        ]

    def _check_open(self, what: str) -> None:
        if self._close is None:
            raise TilewiseError(f"{what}: the stream is closed; make a new one with tilewise.stream")

    # ── a chunk ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _enough_begun(self) -> bool:
        """Whether the chunks that were begun hold all frames of the video."""
        return self._enough(self.source.next_frame)

    def _enough(self, latents: int) -> bool:
        pushed = self.source.pushed
        if pushed is not None and pushed.length is not None:
            self.frames = pushed.length if self._most is None else min(self._most, pushed.length)
        return self.frames is not None and self._frames_of(latents) >= self.frames

    def _frames_of(self, latents: int) -> int:
        """Frames of a video of so many latent frames."""
        return 0 if latents == 0 else 1 + (latents - 1) * self._temporal

    def _begin_beside(self, worker: ThreadPoolExecutor) -> None:
        """Wait for the latents of the next chunk, and begin the one after it."""
        while not self.under_way:
            if self._task is None:
                if self._enough_begun():
                    return
                self._task = worker.submit(self._begin_chunk)
            task = self._task
            task.result()
            self._task = None
        if self._task is None and not self._enough_begun():
            self._task = worker.submit(self._begin_chunk)

    def _begin_chunk(self) -> None:
        begun = time.perf_counter()
        if self._first_begin is None:
            self._first_begin = begun
        first = self.source.next_frame
        device = self.source.device
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()  # of this thread
        with torch.no_grad(), current:
            again = self.source.repeats if self.source.restarts and self.chunks else 0

            def ready(latents: torch.Tensor) -> None:
                denoised = time.perf_counter()
                ends = self._enough(first + latents.shape[2]) or self.source.restarts
                frames = self.decoder.submit(latents, new_clip=again, last=ends)
                arrived = None if self.source.pushed is None else self.source.pushed.arrived
                self.under_way.append(_UnderWay(latents, first, self.prompt, frames, begun, denoised, arrived))

            self.source.chunk(self._frames_of(first), self._check_closing, ready)
            self.chunks += 1

    def _check_closing(self) -> None:
        if self._closing:
            raise _ClosedError

    def _finish_chunk(self) -> Chunk:
        one = self.under_way.pop(0)
        asked = time.perf_counter()
        frames = one.frames.result()
        self.source.shown(frames)
        now = time.perf_counter()
        first = self.frames_out
        if self.frames is not None:
            frames = frames[: self.frames - first]
        self.frames_out += len(frames)
        if self._first_begin is None:
            self._first_begin = one.begun
        stats = {
            "denoise": one.denoised - one.begun,
            "decode": now - one.denoised,
            "wait": now - asked,
            "fps": (self.frames_out - self._frames_before) / max(now - self._first_begin, 1e-9),
        }
        if one.arrived is not None:
            stats["latency"] = now - one.arrived
        return Chunk(frames, first, one.latents, one.first_latent, one.prompt, stats)
