"""Where the page's clips lie: a folder in the form of a batch, so that everything that reads batches reads them too: history,
`tilewise compare`, `generate --from`. The same settings make the same file again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch import manifest
from tilewise.pipelines.batch.job import Job, Stages
from tilewise.pipelines.batch.stream_jobs import Streamed
from tilewise.pipelines.generation.clip_metadata import clip_metadata
from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.files import move_into_place
from tilewise.pipelines.media.rescue import write_or_rescue
from tilewise.pipelines.media.video import read_settings
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.jobs.models import Models

LOCK = ".ui.lock"
DEFAULTS = {"memory_saving": [], "oom_retries": 0, "rank": 0, "world_size": 1}  # of a clip's metadata, as a batch's say


class OutputStore:
    """One folder of clips. folder: absolute."""

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self.folder = models, folder
        self._lock = threading.Lock()

    def place(
        self, settings: GenerateSettings, flop: float, highres: Stages | None = None, stream: Streamed | None = None
    ) -> Job:
        """Where a clip goes: the next place, or its own if it was made before. flop: of its denoising. highres: of a clip of two
        stages, whose target's settings are given. stream: of a stream."""
        known = manifest.read_manifest(self.folder)
        revision = self.models.revision(settings.model)
        job = Job(len(known), (), (), settings, self.models.dtype, revision, flop, highres, stream)
        if job.key in known:
            job = dataclasses.replace(job, index=known[job.key]["run"]["batch"]["index"])
        return job

    def put(self, job: Job, clip: Clip, run: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Writes a clip to its place and its line into the manifest. run: as for `clip_metadata`. Returns file and metadata."""
        told = {name: value for name, value in run.items() if name != "load"}
        seconds = {"load": run.get("load", 0.0), "warm_up": 0.0, **clip.seconds}
        metadata = clip_metadata(clip, {**DEFAULTS, **told, "seconds": seconds, "batch": job.to_dict()})
        path = self.folder / job.file
        write_or_rescue(path, clip.frames, clip.settings.fps, settings=metadata, beside=False)
        manifest.append(self.folder / manifest.NAME, manifest.done_line(path, metadata))
        return path, metadata

    def adopt(self, job: Job, file: Path) -> Path:
        """Moves a finished clip from the same disk to its place, with its line. Raises ConfigError for one without settings."""
        told = read_settings(file)
        if told is None:
            raise ConfigError(f"{file.name} holds no settings of tilewise")
        run = {**DEFAULTS, **told["run"], "batch": job.to_dict()}
        path = self.folder / job.file
        move_into_place(file, path)
        manifest.append(self.folder / manifest.NAME, manifest.done_line(path, {**told, "run": run}))
        return path

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While another page, of another process, writes into the folder, this one waits: places that are taken and filled within
        one such block are unique. Names of files are in any case."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock, (self.folder / LOCK).open("a") as handle:
            with contextlib.suppress(OSError):  # on a file system without locks, one page a folder is the user's affair
                fcntl.flock(handle, fcntl.LOCK_EX)
            manifest.merge(self.folder)  # puts damaged lines aside
            yield  # closing it gives the lock back
