"""One stream while it is made: who reads it, its prompt, pause and end, and what there is to say of it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.pipelines.streaming.preparation import StreamWork
from tilewise.pipelines.streaming.record import Audience, Recorded, record
from tilewise.pipelines.streaming.video_stream import Chunk, VideoStream
from tilewise.ui.web.jobs.job import ENDED, Job
from tilewise.ui.web.live.pictures import source_svg
from tilewise.ui.web.live.pieces import Pieces

GRACE = 5.0  # seconds that a page may take for a reload before its stream ends
PROGRAM_GRACE = 0.5  # the same for a program, which does not come back
# What a viewer has in front when the next chunk must be there, seconds of video and frames: a browser plays no fewer.
MARGIN, LEAST = 1.5, 12
TICK = 0.2  # seconds between two looks at whether somebody still reads


class LiveStream:
    """The live part of a job.

    grace: seconds without a reader after which it ends. paced: whether it goes on no further than a page needs, which tells what
    it has shown.

    The worker's thread runs it; other threads may call all but `run`.
    """

    def __init__(self, job: Job, grace: float = GRACE, paced: bool = True) -> None:
        self.job, self.grace = job, grace
        self.pieces = Pieces()
        self._changed = threading.Condition()
        self._ending = self._paused = False
        self._next_prompt: str | None = None
        self._position = 0.0 if paced else math.inf  # seconds of the video that a page has shown
        self._video: VideoStream | None = None
        self._work: StreamWork | None = None
        self._prompts: list[tuple[float, str]] = []  # seconds of the video, and the prompt from there on
        self._told: dict[str, Any] = {}

    # ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────

    def set_prompt(self, prompt: str) -> None:
        """For the next chunk that is begun. A checked text; one that still waits is replaced."""
        with self._changed:
            self._next_prompt = prompt

    def pause(self, paused: bool) -> None:
        """After the chunk under way nothing is made until it goes on."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def stop(self) -> None:
        """End within a pass; what was made stays."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self.pieces.hurry()

    def seen(self, position: float) -> None:
        """A page has shown the video up to here, seconds: the stream goes on no further ahead than it must."""
        with self._changed:
            self._position = max(position, self._position)
            self._changed.notify_all()

    def state(self, ahead: int | None) -> dict[str, Any]:
        """JSON values for a page. ahead: jobs before this one; None: it does not wait."""
        with self._changed:
            return {
                "status": self.job.status,
                "ended": self.job.status in ENDED,
                "ahead": ahead,
                "paused": self._paused,
                "prompts": [list(one) for one in self._prompts],
                "next_prompt": self._next_prompt,
                "error": self.job.error,
                "result": self.job.result,
                **self._told,
            }

    # ── on the worker's thread ───────────────────────────────────────────────────────────────────────────────────

    def run(self, pipe: Any, work: StreamWork, run: Mapping[str, Any], file: Path) -> Recorded:
        """Make the stream until it has its length, is stopped, or nobody reads it any more. Raises as `record` does."""
        self._work, self._memory = work, PeakMemory(pipe.device)
        self._memory.start()
        with self.pieces.changed:
            if self.pieces.left is not None:  # loading may have taken long
                self.pieces.left = time.monotonic()
        done = threading.Event()
        watchman = threading.Thread(target=self._watch, args=(done,), name="tilewise-live", daemon=True)
        watchman.start()
        try:
            audience = Audience(self._opened, self._shown, self.pieces.put)
            return record(pipe, work, file, run, audience=audience, stop=lambda: self._ending, beside=False)
        finally:
            done.set()
            self.pieces.end()
            watchman.join()
            self._video = None

    def _watch(self, done: threading.Event) -> None:
        """Ends the stream in the middle of a chunk where it must end."""
        while not done.wait(TICK):
            left = self.pieces.left
            if self._ending or self.job.cancelled() or (left is not None and time.monotonic() - left > self.grace):
                self.stop()
                while not done.wait(TICK):
                    if self._video is not None:
                        self._video.close()
                return

    def _opened(self, video: VideoStream) -> None:
        self._video = video

    def _shown(self, chunk: Chunk) -> None:
        """After each chunk: tells of it, waits where nobody needs the next one yet, and changes the prompt."""
        video, work = self._video, self._work
        assert video is not None and work is not None
        fps = work.settings.fps
        seconds = video.frames_out / fps
        took = chunk.stats["denoise"] + chunk.stats["decode"]
        cache = video.cache_bytes
        peak = self._memory.read()
        with self._changed:
            if not self._prompts or self._prompts[-1][1] != chunk.prompt:
                self._prompts.append((chunk.first_frame / fps, chunk.prompt))
            self._told = {
                "frames": video.frames_out,
                "seconds": seconds,
                "total": work.settings.frames / fps,
                "fps": fps,
                "rate": (len(chunk.frames) / took) if took > 0 else 0.0,
                "memory": peak,
                "cache_bytes": cache["total"],
                "source": video.source.view(),
                "picture": source_svg(video.source.view()),
            }
            self.job.touch(phase="stream", done=video.frames_out, total=work.settings.frames)
            self._changed.wait_for(lambda: self._ending or not (self._paused or self._too_far(seconds, took)))
            prompt, self._next_prompt = self._next_prompt, None
        if prompt is not None and not self._ending:
            video.set_prompt(prompt, work.options.prompt_change, work.options.prompt_over)

    def _too_far(self, seconds: float, took: float) -> bool:
        """Whether the next chunk, which takes as long as this one, would be there before a page needs it."""
        assert self._work is not None
        return seconds - self._position > max(MARGIN, LEAST / self._work.settings.fps) + took
