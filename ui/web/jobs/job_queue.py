"""The queue of jobs. One runs on the device at a time, in order of arrival; whoever opens the page can watch and cancel it.

Jobs outlast the tab that asked for them, and the server: the list is on disk. A job that ran when the server stopped is said to
be interrupted; those that waited run when it is started again. Browser tabs only watch: they get a stream of `State`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.plugins.text_format import counted
from tilewise.ui.web.common.messages import LOG, error_message, log_unexpected
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.job import CANCELLED, DONE, ENDED, FAILED, INTERRUPTED, RUNNING, WAITING, Job, State, now
from tilewise.ui.web.jobs.job_file import JobFile

PACE = 0.1  # seconds at least between two states that a watcher of a job is told: told more often, a page falls behind
Work: TypeAlias = Callable[[Mapping[str, Any], Job], Mapping[str, Any]]
"""Does a job from its values, which are checked anew: they may come from an edited file. Gives the result, JSON values."""


def _no(kind: str) -> str | None:
    return None


class JobQueue:
    """waiting: how many may wait at a time; one more is refused. folder: where the list is kept; None: nowhere. refuses: why this
    server does no jobs of a kind, or None.

    problems: what was wrong with the list on disk, in sentences.
    """

    def __init__(self, waiting: int, folder: Path | None = None, refuses: Callable[[str], str | None] = _no) -> None:
        self.waiting = waiting
        self.refuses = refuses
        self.problems: list[str] = []
        self.version = 0  # of the list: another one after each change
        self._kinds: dict[str, Work] = {}
        self._lock = threading.RLock()
        self._jobs: list[Job] = []
        self._closed = False
        self._file = None if folder is None else JobFile(folder)
        # One thread for all work: PyTorch makes a pool of threads for each that calls it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")

    def register(self, kind: str, work: Work) -> None:
        """What does the jobs of a kind."""
        self._kinds[kind] = work

    def start(self) -> None:
        """Takes up the list on disk; all kinds are registered by now."""
        if self._file is None:
            return
        with self._lock:
            earlier, self.problems = self._file.load()
            for problem in self.problems:
                LOG.warning("%s", problem)
            for job in earlier:
                if job.status == RUNNING:
                    job.status, job.ended = INTERRUPTED, now()
            self._jobs = earlier + self._jobs
            for job in earlier:
                job.on_keep = self._save
                if job.status == WAITING:
                    self._worker.submit(self._run, job)
            self._save()

    def submit(self, kind: str, title: str, values: Mapping[str, Any]) -> Job:
        """Queues work. Raises RefusedError if too many wait, or for a kind that this server does not do."""
        if why := self.refuses(kind):
            raise RefusedError(why)
        job = Job(kind, title, values)
        job.on_keep = self._save
        with self._lock:
            wait = [other for other in self._jobs if other.status == WAITING]
            at_work = any(other.status == RUNNING for other in self._jobs)
            if len(wait) - (not at_work) >= self.waiting:
                raise RefusedError(
                    f"{counted(self.waiting, 'job')} already {'waits' if self.waiting == 1 else 'wait'} for the device; "
                    "try again later, or cancel one under Jobs"
                )
            self._jobs.append(job)
            self._save()
            self._worker.submit(self._run, job)
        return job

    def again(self, name: str) -> Job:
        """Queues the work of an ended job once more. Raises RefusedError as `submit`, and for one that is not known."""
        job = self.find(name)
        if job is None or job.status not in ENDED:
            raise RefusedError("only a job that has ended can be run again")
        return self.submit(job.kind, job.title, job.values)

    def find(self, name: str) -> Job | None:
        with self._lock:
            return next((job for job in self._jobs if job.id == name), None)

    def jobs(self) -> list[Job]:
        """All, the latest first."""
        with self._lock:
            return self._jobs[::-1]

    def watch(self, job: Job) -> Iterator[State]:
        """States until the job has ended, PACE apart. Who stops watching leaves the job alone."""
        seen = -1
        while job.status not in ENDED:
            seen = job.wait(seen)
            yield job.state(self.ahead(job))
            job.join(PACE)

    def ahead(self, job: Job) -> int | None:
        """How many jobs come before one that waits; None for one that does not wait."""
        with self._lock:
            if job.status != WAITING or job not in self._jobs:
                return None
            return sum(other.status in (WAITING, RUNNING) for other in self._jobs[: self._jobs.index(job)])

    def cancel(self, name: str) -> bool:
        """Cancels a job that waits or runs; whether there was such a one. One that waits has ended when this returns."""
        with self._lock:
            job = self.find(name)
            if job is None or job.status in ENDED:
                return False
            job.cancel()
            if job.status == WAITING:
                self._end(job, CANCELLED)
        return True

    def clear(self) -> None:
        """Forgets the jobs that have ended; their clips stay."""
        with self._lock:
            self._jobs = [job for job in self._jobs if job.status not in ENDED]
            self.problems = []
            self._save()

    def close(self) -> None:
        """Interrupts the job at work and waits for the worker. Jobs that wait keep their place in the list on disk."""
        with self._lock:
            self._closed = True
            for job in self._jobs:
                if job.status == RUNNING:
                    job.interrupt()
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._file is not None:
            self._file.close()

    def _run(self, job: Job) -> None:
        with self._lock:
            if self._closed or job.status != WAITING:
                return
            job.start()
            self._save()
        status, error = DONE, None
        try:
            if job.kind not in self._kinds:
                raise RefusedError(f"this version of the page has no jobs of the kind {job.kind!r:.40}")
            if why := self.refuses(job.kind):  # of a list that another server left
                raise RefusedError(why)
            job.keep(**self._kinds[job.kind](job.values, job))
        except Cancelled:
            status = CANCELLED
        except BaseException as failure:
            log_unexpected(failure)
            # Not the error itself: its traceback would keep the run's tensors alive for as long as the job is known.
            status, error = FAILED, error_message(failure)
        with self._lock:
            self._end(job, status, error)

    def _end(self, job: Job, status: str, error: str | None = None) -> None:
        job.end(status, error)
        self._save()

    def _save(self) -> None:
        with self._lock:
            self.version += 1
            if self._file is None:
                return
            try:
                self._jobs = self._file.save(self._jobs)
            except (OSError, ValueError) as error:  # the work goes on: a clip is worth more than the list
                self.problems = [f"the list of jobs cannot be written: {error}"]
                LOG.warning("%s", self.problems[0])
