"""`tilewise batch`: read and check the input, run the jobs, report."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tilewise.pipelines.batch.estimate import Estimate, estimate
from tilewise.pipelines.batch.input import lines_words, read_input
from tilewise.pipelines.batch.job import Job, Stages
from tilewise.pipelines.batch.jobs import Plan, Tools, make_jobs, parse_seeds, parse_sweep
from tilewise.pipelines.batch.manifest import NAME, read_manifest
from tilewise.pipelines.batch.manifest_comparison import stages_name, stream_name
from tilewise.pipelines.batch.run import Options, Outcome, run_batch
from tilewise.pipelines.batch.stream_jobs import Streamed
from tilewise.pipelines.conditioning.files import flag
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.generation.settings import DEFAULT_METHOD, DEFAULT_MODEL, GenerateSettings
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.offload import check_offload
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.video import ffmpeg_path
from tilewise.pipelines.memory.estimate import estimate_memory
from tilewise.pipelines.memory.fit import memory_words
from tilewise.pipelines.memory.options import MEMORY_OPTIONS, memory_options
from tilewise.pipelines.memory.plan import device_bytes
from tilewise.pipelines.memory.units import gib
from tilewise.pipelines.parallel.world import World, world_from_environment
from tilewise.pipelines.streaming.settings import not_of_streams
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.explain import Explanation
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.batch_progress import watching
from tilewise.ui.cli.interrupts import Interrupts
from tilewise.ui.cli.progress import quiet_libraries
from tilewise.ui.common.options import method_config, refuse_stream_options, refuse_two_stage_options
from tilewise.ui.common.tables import method_words
from tilewise.ui.common.terminal import say, standard_error, standard_output

SHOWN = 10  # failures that the summary tells about; the manifest has all


class BatchError(TilewiseError):
    """Some clips of a batch could not be made."""


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What the command line said. options: those that were given, for every line that does not say otherwise."""

    input: Path
    out: Path | None
    seeds: str
    sweep: Sequence[str]
    options: dict[str, Any]
    device: str
    overwrite: bool = False
    fail_fast: bool = False
    max_failures: int | None = None
    warm_up: bool | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """A checked request."""

    plan: Plan
    folder: Path
    device: torch.device
    world: World
    options: Options


def dry_run_batch(request: BatchRequest) -> None:
    """Prints the jobs, what their methods would do, and how long and large it would be. Nothing is written."""
    batch = _check(request)
    if batch.world.rank:
        return
    known = read_manifest(batch.folder, batch.plan.notes.append)
    done = {key for key, line in known.items() if line["status"] == "done"} if not batch.options.overwrite else set()
    standard_output().print(_job_table(batch.plan.jobs, done))
    skeleton = functools.cache(load_skeleton)
    for plan in batch.plan.explanations:
        settings = plan.settings
        size = f"{counted(settings.frames, 'frame')} of {settings.height}x{settings.width}, {counted(settings.steps, 'step')}"
        jobs = counted(plan.jobs, "job")
        say(f"\n{jobs}: {settings.model}, {_method_words(settings, plan.stages, plan.stream)}, {size}")
        say(plan.explanation)
        if plan.work is not None:
            say(f"{plan.work.plan}; without the text encoder, which was not loaded")
        elif isinstance(plan.explanation, Explanation):  # that of a stream tells its memory
            dtype = next(job.dtype for job in batch.plan.jobs if job.settings.model == settings.model)
            memory = estimate_memory(skeleton(settings.model), settings, plan.explanation, getattr(torch, dtype))
            say(f"memory: about {gib(memory.total)} of {gib(device_bytes(batch.device))} ({memory_words(memory)})")
    pending = [job for job in batch.plan.jobs if job.key not in done]
    say()
    standard_output().print(_estimate_table(batch, pending, estimate(pending, known.values(), batch.device)))
    for note in batch.plan.notes:
        say(f"note: {note}")


def batch_request(request: BatchRequest) -> None:
    """Makes the clips, and raises BatchError if some could not be made, KeyboardInterrupt if it was interrupted."""
    notes = standard_error()
    with quiet_libraries():
        batch = _check(request)
        check_writable(batch.folder / NAME, suffix=".jsonl")

        def load(model: str, dtype: str, loras: tuple[str, ...]) -> Any:
            offload = batch.options.memory.offload
            return load_pipeline(model, device=str(batch.device), dtype=dtype, offload=offload, loras=loras)

        with watching(notes, batch.world) as watch, Interrupts(watch.note) as interrupts:
            if not batch.world.rank:
                for note in batch.plan.notes:
                    watch.note(note)
            watch.on_work = interrupts.finish_first
            outcome = run_batch(
                batch.plan.jobs, batch.folder, load,
                options=batch.options, world=batch.world, watch=watch, stop=interrupts.asked,
            )  # fmt: skip
    _report(batch, outcome)


def _check(request: BatchRequest) -> Batch:
    """Everything that can be wrong is found here, before weights are read and anything is written."""
    world = world_from_environment()
    device = resolve_device(world.device(request.device))
    if request.max_failures is not None and (request.max_failures < 1 or request.fail_fast):
        raise ConfigError("--max-failures takes a number of at least 1, or else --fail-fast, which is --max-failures 1")
    seeds, sweep = parse_seeds(request.seeds), parse_sweep(request.sweep)
    rows, problems = read_input(request.input)
    memory = memory_options(request.options)
    tools = Tools(
        config=method_config,
        device=device,
        skeleton=functools.cache(load_skeleton),
        revision=functools.cache(model_revision),
        dtype=lambda name: str(resolve_dtype(name, device)).removeprefix("torch."),
        memory=memory,
    )
    check_offload(memory.offload, device)
    fields = {"model": DEFAULT_MODEL, **{name: v for name, v in request.options.items() if name not in MEMORY_OPTIONS}}
    plan = make_jobs(
        request.input, rows, tools,
        command=fields, sweep=sweep, seeds=seeds, usual_method=DEFAULT_METHOD, problems=problems,
    )  # fmt: skip
    _refuse_useless(plan, fields | sweep)
    ffmpeg_path()
    folder = request.out or Path("outputs") / request.input.stem
    for model in {job.settings.model for job in plan.jobs}:
        if model != DEFAULT_MODEL and folder.absolute() == Path(model).expanduser().absolute():
            raise ConfigError(f"the folder {folder} of --out would stand in for the model {model}; give another one")
    check_writable(folder / NAME, suffix=".jsonl", create=False)
    limit = 1 if request.fail_fast else request.max_failures
    options = Options(request.overwrite, limit, memory, request.warm_up)
    return Batch(plan, folder, device, world, options)


def _refuse_useless(plan: Plan, given: Mapping[str, Any]) -> None:
    """Options of clips of two stages or of streams where there is none, or that no stream has, would have no effect."""
    if all(job.highres is None for job in plan.jobs):
        refuse_two_stage_options({name: value for name, value in given.items() if name != "highres"})
        if "strength" in given and not any(files_of(vars(job.settings)) for job in plan.jobs):
            raise ConfigError("--strength is for clips made from a picture or video, and for --highres; here are none")
    if all(job.stream is None for job in plan.jobs):
        refuse_stream_options(given)
    streams = [job.stream.work for job in plan.jobs if job.stream is not None]
    told = {**given, "way": True if any(work.cache is None for work in streams) else None}  # windows have steps
    for name, why in not_of_streams(told).items() if len(streams) == len(plan.jobs) else ():
        if name in given:
            raise ConfigError(f"{flag(name)} cannot be used with --stream: {why}")


def _method_words(settings: GenerateSettings, stages: Stages | None, stream: Streamed | None) -> str:
    if stream is not None:
        return stream_name(settings.method.to_dict(), stream.work.to_dict())
    return method_words(settings.method) if stages is None else stages_name(stages.to_dict())


def _report(batch: Batch, outcome: Outcome) -> None:
    total = len(batch.plan.jobs)
    share = f" (process {batch.world.rank} of {batch.world.size})" if batch.world.size > 1 else ""
    say(f"{outcome.made} made, {outcome.kept + outcome.taken_over} there already, {len(outcome.failed)} failed{share}")
    if (
        outcome.last
    ):  # what is there is known then; a process that was slow to start may not have begun when another ends
        there = (
            f"{total - outcome.missing} of {counted(total, 'clip')} {'is' if total == 1 else 'are'} in {batch.folder}"
        )
        say(f"{there}; their metadata is in {batch.folder / NAME}")
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt
    if outcome.failed:
        told = [
            f"  {job.file} ({lines_words(job.lines)}): {type(error).__name__}: {error}"[:500]
            for job, error in outcome.failed[:SHOWN]
        ]
        more = len(outcome.failed) - SHOWN
        told += [f"  and {more} more, in {batch.folder / NAME}"] if more > 0 else []
        early = " and the batch stopped" if outcome.stopped else ""
        raise BatchError(
            "\n".join([f"{counted(len(outcome.failed), 'clip')} failed{early}; run it again to retry:", *told])
        )


def _job_table(jobs: Sequence[Job], done: set[str]) -> Table:
    table = Table(title=f"dry run: nothing is generated or written; {counted(len(jobs), 'job')}", title_justify="left")
    for name in ("file", "lines", "seed", "method", "size", "steps", "state"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        settings = job.settings
        size = f"{settings.frames}x{settings.height}x{settings.width}"
        lines = ",".join(map(str, job.lines[:5])) + ("…" if len(job.lines) > 5 else "")
        state = "done" if job.key in done else "to make"
        method = _method_words(settings, job.highres, job.stream)
        table.add_row(job.file, lines, str(settings.seed), method, size, str(settings.steps), state)
    return table


def _estimate_table(batch: Batch, pending: Sequence[Job], expected: Estimate) -> Table:
    existing = next(path for path in (batch.folder.absolute(), *batch.folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    table = Table(title="estimate", title_justify="left", show_header=False, show_edge=False)
    processes = f" on {batch.world.size} processes" if batch.world.size > 1 else ""
    table.add_row("to make", f"{len(pending)} of {counted(len(batch.plan.jobs), 'clip')}")
    table.add_row("time", f"{_duration(expected.seconds / batch.world.size)}{processes} ({expected.basis})")
    warning = "" if expected.bytes < free else ": NOT ENOUGH"
    table.add_row("disk", f"about {expected.bytes / 2**20:.1f} MiB, {free / 2**30:.1f} GiB free{warning}")
    table.add_row("folder", str(batch.folder))
    return table


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "1 s or less"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
