"""A queue of jobs. One runs on the device at a time, in order of arrival; its owner can watch and cancel it.

All visitors share one worker thread. Their handlers only watch: what a visitor sees is a stream of `State`, ended by the job's
result or by what it raised.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.ui.web.common.messages import log_unexpected
from tilewise.ui.web.common.safety import RefusedError

TICK = 0.5  # seconds after which a watcher is told anew although nothing happened: the time left goes on


@dataclasses.dataclass(frozen=True)
class State:
    """What a job shows: how many jobs are ahead of it (None: it is at work), its phase with steps, a preview, notes, seconds."""

    ahead: int | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    picture: Any = None
    seconds: float = 0.0
    phase_seconds: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds until the phase ends at the pace so far; None before the first step."""
        return self.phase_seconds * (self.total - self.done) / self.done if self.done and self.total > 1 else None


class Job:
    """Work of one visitor. The worker calls `tell` and `show` as it goes on, and gives up soon after `cancelled()`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.future: Future[Any] = Future()
        self.running = False
        self._cancel = threading.Event()
        self._changed = threading.Condition()
        self._state = State()
        self._started = self._phase_started = time.perf_counter()
        self._version = 0

    def cancel(self) -> None:
        self._cancel.set()
        self.touch()

    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def start(self) -> None:
        self.running = True
        self._started = self._phase_started = time.perf_counter()

    def tell(self, phase: str, done: int, total: int) -> None:
        """As the progress of `generate`; raises Cancelled if the owner has cancelled."""
        if self.cancelled():
            raise Cancelled("stopped on request")
        if phase != self._state.phase or done == 0:
            self._phase_started = time.perf_counter()
        self.touch(phase=phase, done=done, total=total)

    def show(self, picture: Any) -> None:
        """A new preview."""
        self.touch(picture=picture)

    def state(self, ahead: int | None) -> State:
        now = time.perf_counter()
        seconds, in_phase = now - self._started, now - self._phase_started
        return dataclasses.replace(self._state, ahead=ahead, seconds=seconds, phase_seconds=in_phase)

    def wait(self, seen: int) -> int:
        """Returns after something changed since `seen`, or after TICK; with the number of what is seen now."""
        with self._changed:
            if self._version == seen:
                self._changed.wait(TICK)
            return self._version

    def touch(self, **changes: Any) -> None:
        """Changes the state, and wakes who waits for a change."""
        with self._changed:
            self._state = dataclasses.replace(self._state, **changes)
            self._version += 1
            self._changed.notify_all()


class JobQueue:
    """Takes jobs. waiting: how many may wait at a time; one more is refused."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        # One thread for all work: PyTorch makes a pool of threads for each that calls it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")

    def submit(self, owner: str, work: Callable[[Job], Any]) -> Job:
        """Queues work. Raises RefusedError if the owner has a job already, or too many wait."""
        job = Job(owner)
        with self._lock:
            if any(other.owner == owner and not other.cancelled() for other in self._jobs):
                raise RefusedError("this page is at work for you already; cancel that, or wait for it")
            wanted = [other for other in self._jobs if not other.cancelled()]
            if len(wanted) > self.waiting:
                raise RefusedError(f"{len(wanted) - 1} jobs are waiting for the device already; try again later")
            self._jobs.append(job)
        self._worker.submit(self._run, job, work)
        return job

    def watch(self, job: Job) -> Iterator[State]:
        """States until the job has ended; then `job.future` holds what came of it. A watcher that goes away cancels."""
        seen = -1
        try:
            while not job.future.done():
                seen = job.wait(seen)
                yield job.state(self._ahead(job))
                if job.cancelled() and not job.running:
                    return
        finally:
            if not job.future.done():
                job.cancel()

    def cancel(self, owner: str) -> bool:
        """Cancels what an owner has queued or at work; whether there was anything."""
        with self._lock:
            found = [job for job in self._jobs if job.owner == owner]
        for job in found:
            job.cancel()
        return bool(found)

    def close(self) -> None:
        """Cancels everything and waits for the worker."""
        with self._lock:
            found = list(self._jobs)
        for job in found:
            job.cancel()
        self._worker.shutdown(wait=True)

    def _ahead(self, job: Job) -> int | None:
        with self._lock:
            waiting = [other for other in self._jobs if not other.cancelled() or other.running]
            return None if job.running or job not in waiting else waiting.index(job)

    def _run(self, job: Job, work: Callable[[Job], Any]) -> None:
        failure: BaseException | None = None
        result = None
        try:
            if job.cancelled():
                raise Cancelled("stopped on request")
            job.start()
            result = work(job)
        except BaseException as error:
            log_unexpected(error)
            # A traceback would keep the run's tensors alive for as long as somebody holds the job.
            error.__traceback__ = None
            failure = error
        with self._lock:
            self._jobs.remove(job)
        if failure is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(failure)
        job.touch()
