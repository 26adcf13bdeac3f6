"""Clips of the page that several processes make together: the first serves the page, the others follow its jobs.

    first     settings ─► … each step: goes on, or cancelled ─► … ─► how it ended
    others         └────► the same clip, thrown away        └────► how it ended

A job is cancelled in all processes after the same step, as one that stopped alone would leave the others waiting in an exchange.
An error in the middle of the denoising steps ends all processes, unless all of them have it: nobody knows then which exchanges
the others are in.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.cancellation import Cancelled, cancellable
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.parallel.checks import check_shared
from tilewise.pipelines.parallel.ranks import Ranks
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.web.jobs.job import Job

if TYPE_CHECKING:
    from tilewise.ui.web.jobs.models import Models

IDLE = datetime.timedelta(days=365)  # that the others wait for a job
GRACE = 20.0  # seconds that a process whose job failed waits for the others to say the same
TOGETHER = ("generate",)  # kinds of jobs that several processes do together
DENOISE = "denoise"  # the phase with exchanges


class SharedClips:
    """This process's part in the clips of a page. Made in all processes at the same time.

    broken: set where the processes cannot go on together; ``error`` says why.
    """

    def __init__(self, ranks: Ranks, way: str) -> None:
        self.ranks, self.way = ranks, way
        self.broken = threading.Event()
        self.error: str | None = None
        self._group = dist.new_group(backend="gloo", timeout=IDLE)  # nothing on it waits for a GPU
        self._phase = ""

    def check(self, skeleton: Any, settings: GenerateSettings) -> None:
        """Raises ConfigError or UnsupportedModelError for a clip that the processes cannot make together."""
        check_shared(skeleton, settings, self.ranks, self.way)

    def refuses(self, kind: str) -> str | None:
        """Why the page has no jobs of a kind, or None."""
        if kind in TOGETHER:
            return None
        return (
            f"this page makes clips by {self.ranks.count} processes together, and those of this tab are made by one: use the tab "
            "Generate, or start `tilewise ui` without torchrun"
        )

    def load(self, load: Callable[[], Any]) -> Any:
        """A pipeline, loaded in all processes and divided between them."""
        pipe = self.ranks.together(load)
        self.ranks.split(pipe, self.way)
        return pipe

    # ── in the first process ─────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def making(self, settings: GenerateSettings, job: Job) -> Iterator[Callable[[str, int, int], None]]:
        """For a block that makes a clip, which the other processes begin too. Gives its progress, which raises Cancelled."""
        if job.cancelled():
            raise Cancelled("stopped on request")
        self._say(settings.to_dict())

        def tell(phase: str, done: int, total: int) -> None:
            self._go_on(phase, job.cancelled())
            job.report(phase, done, total)

        with self._all_or_none():
            yield tell

    def wait(self) -> NoReturn:
        """Returns never: raises TilewiseError once the processes cannot go on together, or what a signal raises. From then on the
        process has GRACE seconds to end; a job whose exchange nobody answers cannot be waited for."""
        try:
            self.broken.wait()
            raise TilewiseError(str(self.error))
        finally:
            _timer("the page was closed while a job waited for other processes")

    def close(self) -> None:
        """The others end. No job is at work."""
        with contextlib.suppress(TilewiseError):  # those that were ended before
            self._say(None)

    # ── in the others ────────────────────────────────────────────────────────────────────────────────────────────

    def follow(self, models: Models) -> None:
        """Makes what the first process makes, until that closes the page."""
        while (told := self._say(None)) is not None:
            with contextlib.suppress(Cancelled, TilewiseError), self._all_or_none():
                settings = GenerateSettings.from_dict(told)
                pipe, _ = models.pipeline(settings.model)
                with cancellable(pipe):
                    generate(pipe, settings, lambda phase, done, total: self._go_on(phase))

    # ── in all ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _say(self, value: Any) -> Any:
        """What the first process says, in all."""
        told = [value]
        with self._talking():
            dist.broadcast_object_list(told, 0, group=self._group)
        return told[0]

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._break(error)

    def _break(self, error: BaseException) -> NoReturn:
        """Raises an error after which the processes cannot go on together."""
        lost = self.ranks.lost(error)
        said = f"a job failed among its exchanges, where no other can follow: {type(error).__name__}: {error}"
        self.error = self.error or (said if lost is None else str(lost))
        self.broken.set()
        raise (lost or error) from (None if lost is None else error)

    def _go_on(self, phase: str, cancelled: bool = False) -> None:
        """Raises Cancelled in all processes where the first says so, or in none."""
        self._phase = phase
        if self._say(cancelled):
            raise Cancelled("stopped on request")

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """For a job: it ends well in all processes, or fails in all.

        Raises what the block raises, OutputError where only others failed.
        """
        failed: BaseException | None = None
        self._phase = ""
        try:
            yield
        except BaseException as error:
            alike = isinstance(error, Cancelled | TilewiseError)  # all have it, as all have the same settings
            if self.broken.is_set() or self.ranks.lost(error) or (self._phase == DENOISE and not alike):
                self._break(error)
            failed = error
        words = None if failed is None else f"{type(failed).__name__}: {failed}"
        each: list[str | None] = [None] * self.ranks.count
        timer = None if words is None else _timer(f"{words}; the other processes wait in an exchange")
        with self._talking():
            dist.all_gather_object(each, words, group=self._group)
        if timer is not None:
            timer.cancel()
        if failed is not None:
            raise failed
        others = [f"process {rank}: {said}" for rank, said in enumerate(each) if said is not None]
        if others:
            raise OutputError(f"the clip was not made: {others[0]}")


def _timer(why: str) -> threading.Timer:
    """Ends the process after GRACE seconds, unless it is cancelled or the process ends before."""

    def end() -> None:
        print(f"tilewise: {why}; all end", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(GRACE, end)
    timer.daemon = True
    timer.start()
    return timer
