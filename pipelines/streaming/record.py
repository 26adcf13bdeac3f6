"""A stream into a file that plays while it grows, with what makes it again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.files import could_not_write, sidecar, write_text
from tilewise.pipelines.media.growing_video import GrowingVideo
from tilewise.pipelines.media.video import write_settings
from tilewise.pipelines.streaming.preparation import StreamWork, open_stream
from tilewise.plugins.summary import Summary, summary


@dataclass(frozen=True)
class Recorded:
    """A stream that was written.

    work: as it was made, shorter than asked for where it was ended. seconds: "first" until the first frames were there, "denoise"
    and "decode" by the chunks' clocks, which may run at the same time, "total".
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


def record(
    pipe: Any,
    work: StreamWork,
    file: Path,
    run: Mapping[str, Any],
    *,
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
        progress: called after each chunk. stop: asked after each chunk; the stream ends where it is true.
        beside: write the settings as JSON beside the file too. at_end: what else is known of the run in the end.

    Raises:
        OutputError: the file cannot go on; what is in it plays.
    """
    settings = work.settings
    height, width = settings.height, settings.width
    begun = time.perf_counter()
    first = None
    digest = hashlib.sha256()
    report = None
    phases = {"denoise": 0.0, "decode": 0.0}
    started = _metadata(work, run, {})
    with (
        open_stream(pipe, work) as video,
        GrowingVideo(file, settings.fps, height, width, metadata=started) as out,
    ):
        for chunk in video:
            out.write(chunk.frames)
            digest.update(np.ascontiguousarray(chunk.frames).data)
            now = time.perf_counter()
            if first is None:
                first = now
                if beside:
                    _write_beside(file, started)
            for phase in phases:
                phases[phase] += chunk.stats[phase]
            ahead = video.frames_out / settings.fps - (now - first)
            progress(Progress(video.frames_out, settings.frames, chunk.stats["fps"], ahead))
            ended = stop()
            if (ended or video.frames_out >= settings.frames) and not settings.is_dense:
                report = summary(pipe)  # before the patch is off
            if ended:
                break
        cache = video.cache_bytes
        frames, rate, unused = video.frames_out, chunk.stats["fps"], video.prompts.planned
    total = time.perf_counter() - begun
    made = work.until(frames)
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
