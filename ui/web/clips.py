"""The work behind the buttons: clips made on the device, written whole with their records, and told in a manifest.

The page's clips lie in one folder in the form of a batch, so that everything that reads batches (history, `tilewise compare`,
`generate --from`) reads them too. The same settings make the same file again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines import manifest
from tilewise.pipelines.compare import Comparison, compare
from tilewise.pipelines.estimate import denoising_flop
from tilewise.pipelines.files import check_writable
from tilewise.pipelines.generate import Clip, generate, judged, run
from tilewise.pipelines.job import Job as Entry
from tilewise.pipelines.memory import PeakMemory
from tilewise.pipelines.record import clip_record, machine
from tilewise.pipelines.settings import GenerateSettings, explain_settings, prompt_notes
from tilewise.pipelines.stopping import stoppable
from tilewise.pipelines.video import ffmpeg_path, to_uint8, write_video
from tilewise.plugins.patching import patched
from tilewise.plugins.summary import summary
from tilewise.plugins.watch import WatchedCall, watch
from tilewise.ui.web.desk import Job
from tilewise.ui.web.media import Preview
from tilewise.ui.web.models import Models

FOLDER = "ui"  # of the output folder
LOCK = ".ui.lock"


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip on disk. summary: what its attention calls did, as text; None for dense."""

    path: Path
    record: dict[str, Any]
    settings: GenerateSettings
    summary: str | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A clip and the dense one of the same seed, with what `compare` measured."""

    sparse: Made
    dense: Made
    comparison: Comparison


class Studio:
    """Makes clips into a folder. `outputs`: absolute; the clips of the page go to a folder in it."""

    def __init__(self, models: Models, outputs: Path) -> None:
        self.models = models
        self.folder = outputs / FOLDER
        self._lock = threading.Lock()
        ffmpeg_path()
        check_writable(self.folder / manifest.NAME, suffix=".jsonl")

    def clip(self, settings: GenerateSettings, job: Job) -> Made:
        """One clip. On the worker's thread; raises Cancelled soon after the job is cancelled."""
        pipe, told, notes = self._prepare(settings, job)
        preview = self.models.pipeline(settings.model)[1]
        if preview is not None:
            preview.restart()

        def show(done: int, total: int, latents: torch.Tensor) -> None:
            try:
                if preview is not None and (frames := preview.frames(done, latents)) is not None:
                    job.show(Preview(frames, settings.fps * len(frames) / settings.frames))
            except Exception as error:
                notes.append(f"there was no live preview from step {done} on: {error or type(error).__name__}")
                raise  # `generate` goes on without

        peak = PeakMemory(pipe.device)
        peak.start()
        with stoppable(pipe, job.cancelled):
            clip = generate(pipe, settings, job.tell, preview=show)
        return self._write(pipe, clip, {**told, "peak_memory": peak.read(), "notes": notes})

    def pair(self, settings: GenerateSettings, job: Job) -> Pair:
        """The clip of the method and the dense one, from the same noise, timed fairly (see `compare`)."""
        pipe, told, notes = self._prepare(settings, job)
        with stoppable(pipe, job.cancelled):
            result = compare(pipe, settings, job.tell)
        told = {**told, "notes": notes}
        sparse = self._write(pipe, result.sparse, {**told, "comparison": result.to_dict()})
        return Pair(sparse, self._write(pipe, result.dense, told), result)

    def watched(self, settings: GenerateSettings, block: int, job: Job) -> tuple[Made, list[WatchedCall]]:
        """A clip, and what each attention call of one transformer block did at each step."""
        pipe, told, notes = self._prepare(settings, job)
        with stoppable(pipe, job.cancelled), patched(pipe, settings.method), watch(pipe, layers=[block]) as calls:
            output, seconds = run(pipe, settings, job.tell)
            clip = Clip(to_uint8(output), seconds, summary(pipe), settings)
        return self._write(pipe, clip, {**told, "notes": [*notes, "watched"]}), calls

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While another page, of another process, writes into the folder, this one waits: places in the manifest are unique."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as handle:
            with contextlib.suppress(OSError):  # on a file system without locks, one page a folder is the user's affair
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield  # closing it gives the lock back

    def _prepare(self, settings: GenerateSettings, job: Job) -> tuple[Any, dict[str, Any], list[str]]:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        begin = time.perf_counter()
        if not self.models.is_loaded(settings.model):
            job.tell(f"loading {settings.model}", 0, 1)
        pipe, _ = self.models.pipeline(settings.model)
        run = {**machine(pipe.device, self.models.dtype), "started": started, "load": time.perf_counter() - begin}
        return pipe, run, prompt_notes(pipe, settings)

    def _write(self, pipe: Any, clip: Clip, run: dict[str, Any]) -> Made:
        settings = clip.settings
        try:
            clip = judged(pipe, clip)
        except Exception as error:  # a finished clip is worth more than its verdict
            run = {**run, "notes": [*run["notes"], f"the clip could not be judged: {error or type(error).__name__}"]}
        skeleton = self.models.skeleton(settings.model)
        plan = explain_settings(skeleton, settings)
        # What only a call decides counts as dense: at most so much.
        rows = [dataclasses.replace(row, work=1.0) if math.isnan(row.work) else row for row in plan.rows]
        flop = denoising_flop(skeleton, settings, dataclasses.replace(plan, rows=rows))
        seconds = {"load": run.pop("load", 0.0), "warm_up": 0.0, **clip.seconds}
        defaults = {"memory_saving": [], "oom_retries": 0, "rank": 0, "world_size": 1}
        with self._lock, self._alone():
            known = manifest.read_manifest(self.folder)
            entry = Entry(len(known), (), (), settings, self.models.dtype, self.models.revision(settings.model), flop)
            if entry.key in known:  # made before: the same file
                entry = dataclasses.replace(entry, index=known[entry.key]["run"]["batch"]["index"])
            record = clip_record(clip, {**defaults, **run, "seconds": seconds, "batch": entry.to_dict()})
            path = self.folder / entry.file
            write_video(path, clip.frames, settings.fps, settings=record, beside=False)
            manifest.append(self.folder / manifest.NAME, manifest.done_line(path, record))
        return Made(path, record, settings, None if clip.summary is None else str(clip.summary))
