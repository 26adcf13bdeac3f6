"""Make one clip of a batch: generate it within the available memory, score it, and write it with its metadata."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch.input import lines_words
from tilewise.pipelines.batch.job import Job
from tilewise.pipelines.batch.manifest import Line
from tilewise.pipelines.batch.stream_clip import make_stream
from tilewise.pipelines.batch.two_stage_clip import TwoStages
from tilewise.pipelines.batch.two_stage_jobs import about, plan_job
from tilewise.pipelines.conditioning.inputs import Inputs, input_notes
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import clip_metadata, machine
from tilewise.pipelines.generation.generate import Clip, add_content_score, generate, warm_up
from tilewise.pipelines.generation.resolve import explain_settings, prompt_notes
from tilewise.pipelines.highres.preparation import Work
from tilewise.pipelines.loading.model_defaults import size_notes
from tilewise.pipelines.media.rescue import write_or_rescue
from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.pipelines.memory.retry import within_memory
from tilewise.pipelines.parallel.world import World
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """overwrite: make every clip again. max_failures: stop after so many failed jobs (of one process); None is never.
    memory: how to stay within it; offloading is the pipeline's when it is loaded. warm_up: the fewest steps, thrown
    away, for each method and size before the first is timed; None: on a GPU only, where the first run compiles."""

    overwrite: bool = False
    max_failures: int | None = None
    memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)
    warm_up: bool | None = None


class Watch:
    """What a caller may want to see of a batch. Every method may be overridden; here they do nothing."""

    def begin(self, total: int, done: int, mine: int) -> None:
        """total: jobs of the batch. done: made before. mine: jobs that this process will make."""

    def loading(self, model: str) -> None: ...

    def started(self, job: Job) -> None: ...

    def progress(self, phase: str, done: int, total: int) -> None:
        """Of the clip at work, as in `generate`."""

    def finished(self, job: Job, line: Line) -> None: ...

    def failed(self, job: Job, error: Exception) -> None: ...

    def overall(self, done: int) -> None:
        """How many jobs of the whole batch are done, by all processes."""

    def note(self, text: str) -> None: ...


class ClipMaker:
    """Makes clips into a folder, and remembers what it learned about shapes: which are warm, which need less memory, how those
    of two stages are made."""

    def __init__(self, folder: Path, options: Options, world: World, watch: Watch) -> None:
        self.folder, self.options, self.world, self.watch = folder, options, world, watch
        self.warmed: set[str] = set()
        self.measures: dict[str, tuple[str, ...]] = {}
        self.works: dict[str, Work] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}

    def new_pipeline(self, pipe: Any, jobs: Sequence[Job]) -> None:
        """Nothing is warm any more, and the clips of two stages among `jobs` are planned with this pipeline.

        Raises ConfigError, with the lines of all that cannot be made: the input was planned without the text encoder.
        """
        self.warmed.clear()
        self.works.clear()
        refused: dict[str, ConfigError] = {}
        for job in jobs:
            if job.highres is None or job.shape in self.works or job.shape in refused:
                continue
            try:
                self.works[job.shape] = plan_job(pipe, job)
            except ConfigError as error:
                refused[job.shape] = error
        told = []
        for shape, reason in refused.items():
            lines = sorted({line for job in jobs if job.shape == shape for line in job.lines})
            told.append(f"  {lines_words(lines)}: {reason}")
        if told:
            raise ConfigError(
                "\n".join(["the loaded model cannot make these clips; none of its clips was begun:", *told])
            )

    def make(self, pipe: Any, job: Job, load_seconds: float) -> dict[str, Any]:
        """Generates and writes a clip; returns its metadata, as the file holds it."""
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if job.stream is not None:
            return self._make_stream(pipe, job, load_seconds, started)
        notes = prompt_notes(pipe, job.settings)
        if job.highres is None:
            notes += size_notes(pipe, job.settings.height, job.settings.width, job.settings.frames)
            notes += input_notes(pipe, Inputs.of(job.settings))
            notes += self._warnings(pipe, job)
        shared = self._place(pipe, job, started)
        stages = None
        if job.highres is not None:
            notes += self.works[job.shape].notes
            stages = TwoStages(self.folder / job.file, about(self.works[job.shape], job.settings), shared)
        clip, run = self._within_memory(pipe, job, stages)
        try:
            clip = add_content_score(pipe, clip) if stages is None else stages.score_content(pipe)
        except Exception as error:  # a finished clip is worth more than its verdict
            notes.append(f"the clip could not be scored: {str(error) or type(error).__name__}")
        for note in notes:
            self.watch.note(f"{job.file}: {note}")
        seconds = {"load": load_seconds, "warm_up": run.pop("warm_up"), **clip.seconds}
        told = {**shared, "seconds": seconds, **run, "notes": notes}
        if stages is not None:
            told["highres"] = stages.to_dict()
        metadata = clip_metadata(clip, {**told, "batch": job.to_dict()})
        write_or_rescue(self.folder / job.file, clip.frames, clip.settings.fps, settings=metadata, beside=False)
        return metadata

    def _make_stream(self, pipe: Any, job: Job, load_seconds: float, started: str) -> dict[str, Any]:
        assert job.stream is not None
        prompts = [job.settings.prompt, *(prompt for _, prompt in job.stream.work.options.prompts())]
        told = [prompt_notes(pipe, dataclasses.replace(job.settings, prompt=prompt)) for prompt in prompts]
        files = input_notes(pipe, Inputs.of(job.settings))
        notes = list(dict.fromkeys([*(note for of_prompt in told for note in of_prompt), *files]))
        run = {**self._place(pipe, job, started), "load": load_seconds, "notes": notes, "batch": job.to_dict()}
        made = make_stream(self.folder, pipe, job, run, self.watch.progress)
        for note in [*notes, *(f"the prompt {text!r} came after the last chunk had begun" for text in made.unused)]:
            self.watch.note(f"{job.file}: {note}")
        return made.metadata

    def _warnings(self, pipe: Any, job: Job) -> tuple[str, ...]:
        """Where the method never runs, or saves nothing."""
        if job.shape not in self.warnings:
            self.warnings[job.shape] = explain_settings(pipe, job.settings).warnings
        return self.warnings[job.shape]

    def _place(self, pipe: Any, job: Job, started: str) -> dict[str, Any]:
        """What the metadata says of when and where."""
        place = {"rank": self.world.rank, "world_size": self.world.size}
        return {**machine(execution_device(pipe, pipe.device), job.dtype), "started": started, **place}

    def _within_memory(self, pipe: Any, job: Job, stages: TwoStages | None) -> tuple[Clip, dict[str, Any]]:
        """Generates; where memory does not suffice and it was asked for, again with one more measure, until none is left.

        What sufficed for one clip is where the next of the same shape begins."""
        device = execution_device(pipe, pipe.device)
        peak = PeakMemory(device)

        def make() -> tuple[Clip, float | None]:
            peak.start()
            with cancellable(pipe):
                warm = self._warm_up(pipe, job, stages) if self._warms_up(device) else None
                if stages is not None:
                    return stages.make(pipe, self.watch.progress), warm
                return generate(pipe, job.settings, self.watch.progress), warm

        (clip, warm), measures, retries = within_memory(
            pipe,
            make,
            self.measures.get(job.shape, self.options.memory.measures),
            retry=self.options.memory.retry_oom,
            taken=() if stages is None else stages.measures,
            note=lambda text: self.watch.note(f"{job.file}: {text}"),
        )
        self.measures[job.shape] = tuple(measures)
        told = {"memory_saving": measures, "offload": self.options.memory.offload, "oom_retries": retries}
        return clip, {"warm_up": warm, "peak_memory": peak.read(), **told}

    def _warms_up(self, device: torch.device) -> bool:
        wanted = self.options.warm_up
        return device.type == "cuda" if wanted is None else wanted

    def _warm_up(self, pipe: Any, job: Job, stages: TwoStages | None) -> float:
        kernels = job.shape if stages is None else stages.kernels(pipe)
        if kernels in self.warmed:
            return 0.0
        if stages is not None:
            seconds = stages.warm_up(pipe, self.watch.progress)
        else:
            seconds = warm_up(pipe, job.settings, self.watch.progress)
        self.warmed.add(kernels)
        return seconds
