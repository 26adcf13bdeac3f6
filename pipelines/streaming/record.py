"""A stream into a file that plays while it grows, with what makes it again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.pipelines.media.files import could_not_write, sidecar, write_text
from tilewise.pipelines.media.growing_video import GrowingVideo
from tilewise.pipelines.media.video import write_settings
from tilewise.pipelines.streaming.preparation import StreamWork, open_stream
from tilewise.pipelines.streaming.video_stream import Chunk, VideoStream
from tilewise.plugins.patching import is_patched, patched
from tilewise.plugins.summary import Summary, summary


@dataclass(frozen=True)
class Recorded:
    """A stream that was written.

    work: as it was made, shorter than asked for where it was ended. seconds: "first" until the first frames were there, "denoise"
    and "decode" by the chunks' clocks, which may run at the same time, "total", and of a video that is changed "latency": the
    longest from a frame that was read to the chunk that it is in.
    fps: frames a second, of all. cache: bytes of the KV caches, "latent" and "total". unused: prompts whose time came after the
    last chunk had begun. metadata: settings and run, as the file has them. note: what went wrong with the settings in the
    finished file; None: nothing.
    """

    work: StreamWork
    frames: int
    frames_sha256: str
    seconds: dict[str, float]
    fps: float
    cache: dict[str, int]
    summary: Summary | None
    unused: list[str]
    metadata: dict[str, Any]
    note: str | None = None


@dataclass(frozen=True)
class Progress:
    """frames: out, of ``total``. fps: of the stream so far. ahead: seconds of video that are out and that somebody who began to
    watch with the first frames has not seen; below 0 the video has to wait."""

    frames: int
    total: int
    fps: float
    ahead: float


@dataclass(frozen=True)
class Audience:
    """Who watches a stream while it is made, and may change its prompt.

    opened: called with the stream before its first chunk; ``close`` may be called on it from any thread. shown: called with each
    chunk once its frames are with the encoder; the next chunk waits until it returns. sink: gets the file's bytes; see
    ``GrowingVideo``.
    """

    opened: Callable[[VideoStream], None]
    shown: Callable[[Chunk], None]
    sink: Callable[[bytes], None]


def record(
    pipe: Any,
    work: StreamWork,
    file: Path,
    run: Mapping[str, Any],
    *,
    audience: Audience | None = None,
    progress: Callable[[Progress], None] = lambda at: None,
    stop: Callable[[], bool] = lambda: False,
    beside: bool = True,
    at_end: Callable[[], Mapping[str, Any]] = dict,
) -> Recorded:
    """Make the stream and write it to an .mp4 file, which is complete however the stream ends.

    The settings are in the file from its first fragment on; beside it lies the same as JSON. Both get the run's results in the
    end.

    Args:
        pipe: from ``load``.
        run: what the caller knows about the run; "load", the seconds that loading took, goes to the other seconds.
        audience: who watches and changes the prompt: the settings of the video then have the prompts that it was made with, at
            their times. A stream that they close ends with the last finished chunk.
        progress: called after each chunk. stop: asked after each chunk; the stream ends where it is true.
        beside: write the settings as JSON beside the file too. at_end: what else is known of the run in the end.

    Raises:
        OutputError: the file cannot go on; what is in it plays.
        Cancelled: the stream was closed before its first chunk; there is no file.
    """
    settings = work.settings
    height, width = settings.height, settings.width
    begun = time.perf_counter()
    first = None
    digest = hashlib.sha256()
    report, rate = None, 0.0
    prompts: list[tuple[int, str]] = []  # first frame, and what is shown from it on
    phases = {"denoise": 0.0, "decode": 0.0}
    started = _metadata(work, run, {})
    with ExitStack() as stack:
        if not is_patched(pipe):  # here, and not by the stream, so that what is counted outlasts it
            stack.enter_context(patched(pipe, settings.method))
        with (
            open_stream(pipe, work) as video,
            GrowingVideo(
                file, settings.fps, height, width, metadata=started, sink=None if audience is None else audience.sink
            ) as out,
        ):
            if audience is not None:
                audience.opened(video)
            for chunk in video:
                out.write(chunk.frames)
                digest.update(np.ascontiguousarray(chunk.frames).data)
                now = time.perf_counter()
                if first is None:
                    first = now
                    if beside:
                        _write_beside(file, started)
                for phase in ("denoise", "decode"):
                    phases[phase] += chunk.stats[phase]
                rate = chunk.stats["fps"]
                if "latency" in chunk.stats:
                    phases["latency"] = max(phases.get("latency", 0.0), chunk.stats["latency"])
                if not prompts or prompts[-1][1] != chunk.prompt:
                    prompts.append((chunk.first_frame, chunk.prompt))
                ahead = video.frames_out / settings.fps - (now - first)
                progress(Progress(video.frames_out, settings.frames, rate, ahead))
                if audience is not None:
                    audience.shown(chunk)
                if stop():
                    break
            cache = video.cache_bytes
            frames, unused = video.frames_out, video.prompts.planned
        if frames and not settings.is_dense:
            report = summary(pipe)
    if frames == 0:
        raise Cancelled("the stream was ended before its first frames")
    total = time.perf_counter() - begun
    made = work.until(frames)
    if audience is not None:
        made = made.with_prompts(prompts)
    seconds = {"first": (first or begun) - begun, **phases, "total": total}
    result = {
        "density": 1.0 if report is None else report.density,
        "fallbacks": {} if report is None else report.fallbacks,
        "summary": None if report is None else report.to_dict(),
        "content": None,
        "frames_sha256": digest.hexdigest(),
        "seconds": {**({"load": run["load"]} if "load" in run else {}), **seconds},
        "stream_fps": rate,
        "cache_bytes": cache,
        "unused_prompts": unused,
        **at_end(),
    }
    note = None
    metadata = _metadata(made, run, result)
    try:
        write_settings(file, metadata, beside=beside)
    except OutputError as error:  # it takes room for a second copy
        note = str(error)
    return Recorded(made, frames, digest.hexdigest(), seconds, rate, cache, report, unused, metadata, note)


def _metadata(work: StreamWork, run: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in run.items() if name != "load"}
    return {**work.settings.to_dict(), "run": {**result, **known, "stream": work.to_dict()}}


def _write_beside(file: Path, metadata: dict[str, Any]) -> None:
    try:
        write_text(sidecar(file), json.dumps(metadata, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(could_not_write(sidecar(file), error)) from error
