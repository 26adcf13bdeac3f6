"""One job of the page: what was asked for, where it stands, what came of it. It belongs to the server, not to a browser tab."""

from __future__ import annotations

import dataclasses
import datetime
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tilewise.pipelines.generation.cancellation import Cancelled

TICK = 0.5  # seconds after which a watcher is told anew although nothing happened: the time left goes on
WAITING, RUNNING = "waiting", "running"
DONE, FAILED, CANCELLED, INTERRUPTED = "done", "failed", "cancelled", "interrupted"
ENDED = (DONE, FAILED, CANCELLED, INTERRUPTED)
ID = re.compile(r"[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True)
class State:
    """What a job shows: how many jobs are ahead of it (None: it is not waiting), its phase with steps, a preview, seconds.

    all_left: seconds until the whole job ends, where it has more than one clip and can tell.
    """

    ahead: int | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    picture: Any = None
    seconds: float = 0.0
    phase_seconds: float = 0.0
    all_left: float | None = None

    @property
    def left(self) -> float | None:
        """Seconds until the phase ends at the pace so far; None before the first step."""
        return self.phase_seconds * (self.total - self.done) / self.done if self.done and self.total > 1 else None


class Job:
    """kind: of the work, a name that the queue knows. title: in words. values: JSON values that the work needs, and no other.

    The worker calls `tell`, `show` and `keep` as it goes on, and gives up soon after `cancelled()`. Other threads read.
    """

    def __init__(self, kind: str, title: str = "", values: Mapping[str, Any] | None = None, name: str = "") -> None:
        self.id = name or secrets.token_hex(6)
        self.kind, self.title, self.values = kind, title, dict(values or {})
        self.status = WAITING
        self.created = now()
        self.started: str | None = None
        self.ended: str | None = None
        self.result: dict[str, Any] = {}
        self.error: str | None = None
        self.on_keep: Callable[[], None] = lambda: None  # the queue writes down what was kept
        self._interrupted = False
        self._cancel = threading.Event()
        self._changed = threading.Condition()
        self._state = State()
        self._began = self._phase_began = time.perf_counter()
        self._version = 0

    def cancel(self) -> None:
        self._cancel.set()
        self.touch()

    def interrupt(self) -> None:
        """As `cancel`, because the server ends and not because somebody asked for it."""
        self._interrupted = True
        self.cancel()

    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def interrupted(self) -> bool:
        """Whether the server ends."""
        return self._interrupted

    def start(self) -> None:
        self.status, self.started = RUNNING, now()
        self._began = self._phase_began = time.perf_counter()
        self.touch()

    def end(self, status: str, error: str | None = None) -> None:
        self.status = INTERRUPTED if status == CANCELLED and self._interrupted else status
        self.error, self.ended = error, now()
        self.touch(picture=None)  # a preview that nobody will look at any more holds memory

    def tell(self, phase: str, done: int, total: int, all_left: float | None = None) -> None:
        """As the progress of `generate`; raises Cancelled if that was asked for. all_left: as in `State`."""
        if self.cancelled():
            raise Cancelled("stopped on request")
        self.report(phase, done, total, all_left)

    def report(self, phase: str, done: int, total: int, all_left: float | None = None) -> None:
        """The same of work that goes on, for now, even if it was cancelled."""
        if phase != self._state.phase or done == 0:
            self._phase_began = time.perf_counter()
        self.touch(phase=phase, done=done, total=total, all_left=all_left)

    def show(self, picture: Any) -> None:
        """A new preview."""
        self.touch(picture=picture)

    def keep(self, **result: Any) -> None:
        """Adds JSON values to the result, which last even if the job does not end well."""
        self.result |= result
        self.on_keep()
        self.touch()

    def state(self, ahead: int | None) -> State:
        time_now = time.perf_counter()
        seconds, in_phase = time_now - self._began, time_now - self._phase_began
        return dataclasses.replace(self._state, ahead=ahead, seconds=seconds, phase_seconds=in_phase)

    def wait(self, seen: int) -> int:
        """Returns after something changed since `seen`, or after TICK; with the number of what is seen now."""
        with self._changed:
            if self._version == seen:
                self._changed.wait(TICK)
            return self._version

    def join(self, timeout: float) -> str:
        """Waits until the job has ended, seconds at most; its status."""
        with self._changed:
            self._changed.wait_for(lambda: self.status in ENDED, timeout)
            return self.status

    def touch(self, **changes: Any) -> None:
        """Changes the state, and wakes who waits for a change."""
        with self._changed:
            self._state = dataclasses.replace(self._state, **changes)
            self._version += 1
            self._changed.notify_all()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Job:
        """What `to_dict` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        job = cls(told["kind"], told["title"], told["values"], told["id"])
        for name, kinds in FIELDS.items():
            if not isinstance(told[name], kinds):
                raise TypeError(f"{name} is a {type(told[name]).__name__}")
            setattr(job, name, told[name])
        if not ID.fullmatch(job.id) or job.status not in (WAITING, RUNNING, *ENDED):
            raise ValueError("no job has such an id or status")
        return job


FIELDS: dict[str, Any] = {
    "id": str, "kind": str, "title": str, "values": dict, "status": str, "created": str, "started": str | None,
    "ended": str | None, "result": dict, "error": str | None,
}  # fmt: skip
"""What is written down of a job, with the types."""


def now() -> str:
    """Date and time, to the second, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
