"""The live streams of the page: jobs of one kind, of which one is made at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.stream_jobs import Streamed
from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.pipelines.loading.revision import weights_fingerprint
from tilewise.pipelines.streaming.preparation import StreamWork
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.jobs.job import ENDED, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.output_store import OutputStore
from tilewise.ui.web.live.live_stream import PROGRAM_GRACE, LiveStream
from tilewise.ui.web.live.requests import work_of

KIND = "live"
FOLDER = "live"  # of the output folder
UNSAVED = ".unsaved"  # of that folder: videos that go when the next stream begins


class LiveHub:
    """Starts and finds streams. outputs: absolute; saved videos go to a folder in it."""

    def __init__(self, models: Models, limits: Limits, job_queue: JobQueue, outputs: Path) -> None:
        self.models, self.limits, self.job_queue = models, limits, job_queue
        self.store = OutputStore(models, outputs / FOLDER)
        self._lock = threading.RLock()
        self._streams: dict[str, LiveStream] = {}  # of jobs that wait or run
        self._unsaved: dict[str, StreamWork] = {}  # as it was made, by the id of the job
        job_queue.register(KIND, self.work)

    def checked(self, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Title and values of the job of a stream; see `requests.py` for those. Raises as `work_of`, and RefusedError while
        another stream is made."""
        work = work_of(values, self.models, self.limits)
        if any(job.kind == KIND and job.status not in ENDED for job in self.job_queue.jobs()):
            raise RefusedError("a stream is being made already, and there is one at a time: stop it first, under Jobs")
        return work.settings.prompt[:200], dict(values)

    def start(self, values: Mapping[str, Any]) -> LiveStream:
        """Queues a stream for a program, which takes it as fast as it comes. Raises as `checked`."""
        with self._lock:
            title, checked = self.checked(values)
            job = self.job_queue.submit(KIND, title, checked)
            return self._streams.setdefault(job.id, LiveStream(job, PROGRAM_GRACE, paced=False))

    def find(self, name: str) -> LiveStream | None:
        """The stream of a job that waits or runs, by its id."""
        with self._lock:
            job = self.job_queue.find(name)
            if job is None or job.kind != KIND:
                return None
            if job.status in ENDED:
                return self._streams.get(name)
            return self._streams.setdefault(name, LiveStream(job))

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """On the worker's thread; see `JobQueue.register`."""
        with self._lock:
            live = self._streams.setdefault(job.id, LiveStream(job))
        try:
            work = work_of(values, self.models, self.limits)
            self._forget_unsaved()
            pipe, run = self.models.begin_stream(work, job)
            file = self._file(job.id)
            file.parent.mkdir(parents=True, exist_ok=True)
            made = live.run(pipe, work, run, file)
            with self._lock:
                self._unsaved[job.id] = made.work
            if job.interrupted():
                raise Cancelled("the server stops")
            return {
                "frames": made.frames,
                "seconds": made.frames / work.settings.fps,
                "fps": made.fps,
                "note": made.note,
            }
        finally:
            live.pieces.end()
            with self._lock:  # the last states can be read for as long as it is the latest
                self._streams = {name: one for name, one in self._streams.items() if one.job.status not in ENDED}
                self._streams[job.id] = live

    def save(self, name: str) -> str:
        """Keeps the video of a stream that has ended, in the outputs and in their history; its path within the outputs.

        Raises ConfigError if it is not there, or not whole yet.
        """
        job = self.job_queue.find(name)
        with self._lock:
            if job is not None and "saved" in job.result:
                return str(job.result["saved"])
            if job is None or name not in self._unsaved:
                raise ConfigError(
                    "there is no video to save: a stream can be saved when it has ended, until the next begins"
                )
            work = self._unsaved[name]
            weights = "" if work.checkpoint is None else weights_fingerprint([work.checkpoint])
            with self.store.alone():
                place = self.store.place(work.settings, 0.0, stream=Streamed(work, weights))
                saved = self.store.adopt(place, self._file(name))
            del self._unsaved[name]
        told = saved.relative_to(self.store.folder.parent).as_posix()
        job.keep(saved=told)
        return told

    def close(self) -> None:
        """End all streams, so that no reader keeps the server from ending, and drop what was not saved."""
        with self._lock:
            streams = list(self._streams.values())
        for one in streams:
            one.stop()
            one.pieces.end()
        self._forget_unsaved()

    def _file(self, name: str) -> Path:
        return self.store.folder / UNSAVED / f"{name}.mp4"

    def _forget_unsaved(self) -> None:
        with self._lock:
            names, self._unsaved = list(self._unsaved), {}
        for name in names:
            self._file(name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds others
            (self.store.folder / UNSAVED).rmdir()
