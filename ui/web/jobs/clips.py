"""Jobs that make clips: generate on the device, write with metadata, add to the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch import manifest
from tilewise.pipelines.batch.estimate import denoising_flop
from tilewise.pipelines.conditioning.inputs import Inputs, input_notes
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import read_clip_metadata
from tilewise.pipelines.generation.compare import compare
from tilewise.pipelines.generation.generate import Clip, Progress, add_content_score, generate, run
from tilewise.pipelines.generation.resolve import explain_settings, prompt_notes
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.video import ffmpeg_path, to_uint8
from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import patched
from tilewise.plugins.summary import summary
from tilewise.plugins.watch import WatchedCall, watch
from tilewise.ui.web.common.media import Preview
from tilewise.ui.web.jobs.job import Job
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.output_store import OutputStore

FOLDER = "ui"  # of the output folder


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip on disk. run: how it went, the "run" of its metadata."""

    path: Path
    settings: GenerateSettings
    run: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Made:
        """A clip that was made earlier. Raises ConfigError where it is no longer there, and as `read_clip_metadata`."""
        told = read_clip_metadata(path)
        return cls(path, told.settings, told.run)


def find_clip(outputs: Path, name: Any) -> Made:
    """The clip that a job made, by its name within the outputs. Raises ConfigError if it is no longer there."""
    path = (outputs / str(name)).resolve()
    if not path.is_relative_to(outputs):  # the list of jobs may have been edited
        raise ConfigError(f"there is no clip {str(name)[:80]!r} in the outputs")
    return Made.read(path)


class Studio:
    """Makes clips into a folder. `outputs`: absolute; the clips of the page go to a folder in it."""

    def __init__(self, models: Models, outputs: Path) -> None:
        self.models, self.outputs = models, outputs
        self.store = OutputStore(models, outputs / FOLDER)
        ffmpeg_path()
        check_writable(self.store.folder / manifest.NAME, suffix=".jsonl")

    def name(self, made: Made) -> str:
        """What the list of jobs calls a clip."""
        return made.path.relative_to(self.outputs).as_posix()

    def find(self, name: Any) -> Made:
        """As `find_clip`, in this folder."""
        return find_clip(self.outputs, name)

    def clip(self, settings: GenerateSettings, job: Job) -> Made:
        """One clip. On the worker's thread; raises Cancelled soon after the job is cancelled, and after the step where several
        processes make it."""
        if (shared := self.models.shared) is not None:
            with shared.making(settings, job) as tell:
                pipe, clip, run = self._clip(settings, job, tell, lambda: False)
            run |= {"gpus": shared.ranks.count, "parallel": shared.way}
        else:
            pipe, clip, run = self._clip(settings, job, job.tell, job.cancelled)
        return self._write(pipe, clip, run)

    def _clip(
        self, settings: GenerateSettings, job: Job, tell: Progress, stop: Callable[[], bool]
    ) -> tuple[Any, Clip, dict[str, Any]]:
        """The pipeline, the clip and how the run went."""
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
        with cancellable(pipe, stop):
            clip = generate(pipe, settings, tell, preview=show)
        return pipe, clip, {**told, "peak_memory": peak.read(), "notes": notes}

    def pair(self, settings: GenerateSettings, job: Job) -> tuple[Made, Made, dict[str, Any]]:
        """The clip of the method and the dense one, from the same noise, timed fairly (see `compare`), and the numbers."""
        pipe, told, notes = self._prepare(settings, job)
        with cancellable(pipe, job.cancelled):
            result = compare(pipe, settings, job.tell)
        told = {**told, "notes": notes}
        numbers = result.to_dict()
        sparse = self._write(pipe, result.sparse, {**told, "comparison": numbers})
        return sparse, self._write(pipe, result.dense, told), numbers

    def watched(self, settings: GenerateSettings, block: int, job: Job) -> tuple[Made, list[WatchedCall]]:
        """A clip, and what each attention call of one transformer block did at each step."""
        pipe, told, notes = self._prepare(settings, job)
        with cancellable(pipe, job.cancelled), patched(pipe, settings.method), watch(pipe, layers=[block]) as calls:
            output, seconds = run(pipe, settings, job.tell)
            clip = Clip(to_uint8(output), seconds, summary(pipe), settings)
        return self._write(pipe, clip, {**told, "notes": [*notes, "watched"]}), calls

    def _prepare(self, settings: GenerateSettings, job: Job) -> tuple[Any, dict[str, Any], list[str]]:
        pipe, run = self.models.begin_run(settings.model, job)
        return pipe, run, [*prompt_notes(pipe, settings), *input_notes(pipe, Inputs.of(settings))]

    def _write(self, pipe: Any, clip: Clip, run: dict[str, Any]) -> Made:
        settings = clip.settings
        try:
            clip = add_content_score(pipe, clip)
        except Exception as error:  # a finished clip is worth more than its verdict
            run = {**run, "notes": [*run["notes"], f"the clip could not be scored: {error or type(error).__name__}"]}
        skeleton = self.models.skeleton(settings.model)
        flop = denoising_flop(skeleton, settings, explain_settings(skeleton, settings))
        with self.store.alone():
            path, metadata = self.store.put(self.store.place(settings, flop), clip, run)
        return Made(path, settings, metadata["run"])
