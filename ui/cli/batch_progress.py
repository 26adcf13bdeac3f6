"""What a batch shows while it runs, on stderr: one bar for all clips and one for the clip at work; into a file, lines.

Of several processes the first has the bars, which count what all of them make; the others say what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.batch.manifest import Line, spent
from tilewise.pipelines.batch.run import Watch
from tilewise.pipelines.parallel.world import World
from tilewise.plugins.text_format import counted
from tilewise.ui.common.shares import shares_words
from tilewise.ui.common.terminal import shown


class Shown(Watch):
    """Lines for a log file or pipe. on_work: told whether a clip is at work."""

    def __init__(self, console: Console, world: World) -> None:
        self.console = console
        self.prefix = f"process {world.rank}: " if world.size > 1 else ""
        self.on_work: Callable[[bool], None] = lambda working: None
        self.mine = self.made = 0

    def begin(self, total: int, done: int, mine: int) -> None:
        self.mine = mine
        self.say(f"{counted(total, 'clip')}, {done} done before, {mine} to make" + (" here" if self.prefix else ""))

    def loading(self, model: str) -> None:
        self.say(f"loading {model}")

    def started(self, job: Job) -> None:
        self.on_work(True)
        self.say(f"[{self.made + 1}/{self.mine}] {job.file}")

    def finished(self, job: Job, line: Line) -> None:
        self.on_work(False)
        self.made += 1
        self.say(f"[{self.made}/{self.mine}] made in {spent(line, 'total'):.1f} s, {shares_words(line['run'])}")

    def failed(self, job: Job, error: Exception) -> None:
        self.on_work(False)
        self.made += 1
        self.say(f"[{self.made}/{self.mine}] failed: {job.file}: {type(error).__name__}: {error}"[:500], "red")

    def note(self, text: str) -> None:
        self.say(f"note: {text}", "yellow")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(self.prefix + text, style=style, soft_wrap=True)


class Quiet(Shown):
    """Notes and failures only: another process has the bars."""

    def begin(self, total: int, done: int, mine: int) -> None:
        self.mine = mine

    def loading(self, model: str) -> None: ...

    def started(self, job: Job) -> None:
        self.on_work(True)

    def finished(self, job: Job, line: Line) -> None:
        self.on_work(False)
        self.made += 1


class Bars(Quiet):
    """Two bars: clips of the whole batch, steps of the clip at work."""

    def __init__(self, console: Console, world: World, bars: Progress) -> None:
        super().__init__(console, world)
        self.bars = bars
        self.alone = world.size == 1
        self.all: TaskID = bars.add_task("clips", total=None)
        self.steps: TaskID = bars.add_task("", total=None, visible=False)

    def begin(self, total: int, done: int, mine: int) -> None:
        super().begin(total, done, mine)
        self.bars.update(self.all, total=total, completed=done)

    def loading(self, model: str) -> None:
        self.bars.reset(self.steps, description=shown(f"loading {model}"), total=None, visible=True)

    def started(self, job: Job) -> None:
        super().started(job)
        self.bars.reset(self.steps, description=shown(job.file), total=None, visible=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        self.bars.update(self.steps, description=phase, completed=done, total=total, visible=True)

    def finished(self, job: Job, line: Line) -> None:
        super().finished(job, line)
        self.bars.advance(self.all)

    def overall(self, done: int) -> None:
        self.bars.update(self.all, completed=done)
        self.bars.update(self.steps, visible=False)


@contextmanager
def watching(console: Console, world: World) -> Iterator[Shown]:
    """How this process shows its part of a batch."""
    if not console.is_terminal:
        yield Shown(console, world)
        return
    if world.rank:
        yield Quiet(console, world)
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield Bars(console, world, bars)
