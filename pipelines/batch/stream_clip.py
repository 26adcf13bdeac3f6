"""Make one stream of a batch. It grows in a folder of its own and is moved to its place when it is whole."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.media.files import move_into_place
from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.pipelines.streaming.record import Recorded, record


def make_stream(
    folder: Path, pipe: Any, job: Job, run: Mapping[str, Any], progress: Callable[[str, int, int], None]
) -> Recorded:
    """Makes and writes it. run: what its metadata says of the run. Raises OutputError, and as the stream does."""
    assert job.stream is not None
    work = dataclasses.replace(job.stream.work, settings=job.settings)
    part = folder / f".{job.file}.{os.getpid()}-{secrets.token_hex(3)}.part"
    peak = PeakMemory(pipe.device)
    peak.start()
    try:
        part.mkdir()
        made = record(
            pipe,
            work,
            part / job.file,
            run,
            beside=False,
            progress=lambda at: progress("stream", at.frames, at.total),
            at_end=lambda: {"peak_memory": peak.read()},
        )
        if made.note is not None:
            raise OutputError(made.note)
        move_into_place(part / job.file, folder / job.file)
        return made
    finally:
        shutil.rmtree(part, ignore_errors=True)
