"""Run the jobs of a batch. Each clip is complete or absent, and recorded once, wherever the run is interrupted.

A clip is written under another name, synchronised to disk and renamed; then its line is appended to the manifest, and
synchronised. A stop at any point therefore costs the clip at work and no other: one that is whole but has no line yet is found
by its name and taken over from its own metadata.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch import manifest
from tilewise.pipelines.batch.clip import ClipMaker, Options, Watch
from tilewise.pipelines.batch.folder_lock import FolderLock
from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.batch.ranks import owned
from tilewise.pipelines.errors import OutputError, SetupError
from tilewise.pipelines.generation.clip_metadata import begin_run
from tilewise.pipelines.media.files import PART, check_writable, remove_stale
from tilewise.pipelines.media.rescue import RescuedError
from tilewise.pipelines.media.video import read_frames, read_settings
from tilewise.pipelines.memory.limits import free_memory, is_out_of_memory
from tilewise.pipelines.parallel.world import World
from tilewise.pipelines.streaming.preparation import put_weights
from tilewise.plugins.text_format import counted

Load = Callable[[str, str, tuple[str, ...]], Any]
"""Called as load(model, dtype, loras); gives a pipeline on its device, with the LoRAs in its weights."""


class DiskFullError(OutputError):
    """There is no space left for clips. What was made is kept, and a rerun goes on from there."""


@dataclasses.dataclass
class Outcome:
    """What one process did. made, taken_over, kept: jobs made now, found whole without a line, done before. failed: jobs with
    their errors. stopped: why it ended before its jobs did, if so. missing: jobs of the whole batch that are not done. last:
    whether no other process of it was left."""

    made: int = 0
    taken_over: int = 0
    kept: int = 0
    failed: list[tuple[Job, Exception]] = dataclasses.field(default_factory=list)
    stopped: str | None = None
    missing: int = 0
    last: bool = False


def run_batch(
    jobs: Sequence[Job],
    folder: Path,
    load: Load,
    *,
    options: Options | None = None,
    world: World | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Makes the clips of `jobs` that are not in `folder` yet: those of this process, if there are several.

    stop: asked before each clip; True ends the batch there. A job that fails is written down and does not stop the others.

    Raises BusyError if another batch is at work in the folder, OutputPathError if it cannot be written to, ManifestError,
    DiskFullError, SetupError if a model cannot be loaded.
    """
    options, world, watch = options or Options(), world or World(), watch or Watch()
    check_writable(folder / manifest.NAME, suffix=".jsonl")
    keys = hashlib.sha256("".join(job.key for job in jobs).encode()).hexdigest()
    lock = FolderLock(folder, f"{world.size} processes, jobs {keys}", world.rank, world.size)
    lock.enter(lambda: _tidy(folder, watch))
    try:
        outcome = _Run(jobs, folder, load, options, world, watch, stop).work()
        lock.stop_working()
        # A launcher ends all processes when one ends with an error, and those may have good work to finish.
        while outcome.stopped is None and lock.others_working():
            watch.overall(_count_done(jobs, manifest.read_manifest(folder)))
            if stop():
                outcome.stopped = "interrupted"
            time.sleep(0.5)
    finally:
        last: list[bool] = []

        def when_last() -> None:
            last.append(True)
            _tidy(folder, watch)

        lock.leave(when_last)
    outcome.last = bool(last)
    done = _count_done(jobs, manifest.read_manifest(folder))
    watch.overall(done)
    outcome.missing = len(jobs) - done
    return outcome


def _tidy(folder: Path, watch: Watch) -> None:
    """Removes what a process that was killed left half-written, and merges shards. Nobody else is at work in the folder."""
    remove_stale(folder)
    for path in folder.iterdir():
        if PART.fullmatch(path.name) and path.is_dir():  # of a stream
            shutil.rmtree(path, ignore_errors=True)
    manifest.merge(folder, watch.note)


def _count_done(jobs: Sequence[Job], known: dict[str, manifest.Line]) -> int:
    return sum(job.key in known and known[job.key]["status"] == "done" for job in jobs)


class _Run:
    """The work of one process."""

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        load: Load,
        options: Options,
        world: World,
        watch: Watch,
        stop: Callable[[], bool],
    ) -> None:
        self.jobs, self.folder, self.load, self.options = jobs, folder, load, options
        self.world, self.watch, self.stop = world, watch, stop
        self.shard = manifest.shard_path(folder, world.rank, world.size)
        self.outcome = Outcome()
        self.maker = ClipMaker(folder, options, world, watch)

    def work(self) -> Outcome:
        known = manifest.read_manifest(self.folder)
        self._say_versions(known)
        pending = [job for job in owned(self.jobs, self.world) if not self._is_done(job, known.get(job.key))]
        done = 0 if self.options.overwrite else _count_done(self.jobs, known) + self.outcome.taken_over
        self.watch.begin(len(self.jobs), done, len(pending))
        for loaded in dict.fromkeys(job.loaded for job in pending):
            if not self._make_all([job for job in pending if job.loaded == loaded]):
                break
        return self.outcome

    def _say_versions(self, known: dict[str, manifest.Line]) -> None:
        from tilewise import __version__

        others = sorted({str(line["tilewise"]) for line in known.values()} - {__version__})
        if others:
            self.watch.note(
                f"the manifest also holds clips of tilewise {', '.join(others)}; this is {__version__}, and another version "
                "may make another clip: what it has not made itself is made again, beside them"
            )

    def _is_done(self, job: Job, line: manifest.Line | None) -> bool:
        if self.options.overwrite:
            return False
        if line is not None and line["status"] == "done":
            whole = manifest.is_whole(self.folder, line)
            self.outcome.kept += whole
            if not whole:
                self.watch.note(f"{line['file']} is missing or not as it was written: it is made again")
            return whole
        if (metadata := self._whole_without_line(job)) is not None:
            manifest.append(self.shard, manifest.done_line(self.folder / job.file, metadata))
            self.outcome.taken_over += 1
            return True
        return False

    def _whole_without_line(self, job: Job) -> dict[str, Any] | None:
        """The metadata of a clip that was renamed into place just before the machine stopped."""
        path = self.folder / job.file
        if not path.is_file():
            return None
        try:
            metadata = read_settings(path)
            if metadata is None or manifest.key_of(metadata) != job.key:
                return None
            return metadata if len(read_frames(path)) == job.settings.frames else None
        except (OutputError, KeyError, TypeError, ValueError):
            return None

    def _make_all(self, jobs: Sequence[Job]) -> bool:
        """Makes the clips of one loaded pipeline; False to stop the batch."""
        if self._should_stop():
            return False
        model, dtype, stream = jobs[0].settings.model, jobs[0].dtype, jobs[0].stream

        def read() -> Any:
            pipe = self.load(model, dtype, jobs[0].settings.lora if stream is None else ())
            if stream is not None:
                put_weights(pipe, stream.work)
            return pipe

        pipe, told = begin_run(model, dtype, read, self.watch.loading)
        load_seconds = told["load"]
        try:
            self.maker.new_pipeline(pipe, jobs)
            for job in jobs:
                if self._should_stop():
                    return False
                self._make(pipe, job, load_seconds)
                load_seconds = 0.0
            return not self._should_stop()
        finally:
            del pipe
            gc.collect()
            free_memory()

    def _should_stop(self) -> bool:
        limit = self.options.max_failures
        if limit is not None and len(self.outcome.failed) >= limit:
            self.outcome.stopped = f"{counted(len(self.outcome.failed), 'job')} failed"
        elif self.stop():
            self.outcome.stopped = "interrupted"
        return self.outcome.stopped is not None

    def _make(self, pipe: Any, job: Job, load_seconds: float) -> None:
        self.watch.started(job)
        path = self.folder / job.file
        try:
            metadata = self.maker.make(pipe, job, load_seconds)
            line = manifest.done_line(path, metadata)
            manifest.append(self.shard, line)
        except SetupError:
            raise
        except Exception as error:
            if _is_disk_full(error):
                raise self._disk_full(error) from error
            self._fail(job, error)
            if _is_device_lost(error):
                raise
        else:
            self.outcome.made += 1
            self.watch.finished(job, line)

    def _fail(self, job: Job, error: Exception) -> None:
        metadata = {**job.settings.to_dict(), "run": {"batch": job.to_dict()}}
        try:
            manifest.append(self.shard, manifest.failed_line(metadata, error))
        except OSError as full:
            raise self._disk_full(error) if _is_disk_full(full) else full from error
        self.outcome.failed.append((job, error))
        error.__traceback__ = None  # it would keep the run's tensors alive
        self.watch.failed(job, error)
        free_memory()

    def _disk_full(self, error: Exception) -> DiskFullError:
        saved = f", the clip at work in {error.frames}" if isinstance(error, RescuedError) else ""
        return DiskFullError(
            f"no space left in {self.folder}; what is made so far is kept{saved}. Free some space and run the same command again"
        )


def _is_disk_full(error: BaseException) -> bool:
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, OSError) and told.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(told, OutputError) and "No space left on device" in str(told):  # ffmpeg's words
            return True
        told = told.__cause__
    return False


def _is_device_lost(error: Exception) -> bool:
    """An error after which a GPU does nothing more for this process, such as an illegal memory access."""
    lost = getattr(torch, "AcceleratorError", None)
    return lost is not None and isinstance(error, lost) and not is_out_of_memory(error)
