"""The work behind `tilewise generate`: check everything, load, run, write, report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tilewise.pipelines.compare import Comparison, compare, side_by_side
from tilewise.pipelines.files import check_sidecar, check_writable
from tilewise.pipelines.generate import Clip, call_arguments, generate, judged
from tilewise.pipelines.loading import load_pipeline, load_skeleton, resolve_device, resolve_dtype
from tilewise.pipelines.settings import GenerateSettings, explain_settings, prompt_notes, resolve_settings
from tilewise.pipelines.video import ffmpeg_path, write_settings, write_video
from tilewise.plugins.errors import ConfigError
from tilewise.ui.options import config_file, default_out, method_config
from tilewise.ui.report import print_files, print_result, print_settings


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line said. wishes: settings by name, None where the model's own are wanted."""

    prompt: str
    model: str
    method: str
    window: str | None
    density: float | None
    wishes: dict[str, Any]
    out: Path | None
    compare: str | None
    device: str
    dtype: str


def dry_run_request(request: Request) -> None:
    """Prints the settings and what the method would do. Nothing is written, and no weights are read."""
    skeleton, settings, files = _check(request, create=False)
    device = resolve_device(request.device)
    print_settings(settings, str(device), _dtype_name(request), files)
    print(explain_settings(skeleton, settings))


def generate_request(request: Request) -> None:
    """Makes the clip, or with --compare both clips, and reports."""
    notes = Console(stderr=True)
    with _quiet_libraries():
        _, settings, files = _check(request, create=True)
        with notes.status(f"loading {request.model} …"):
            pipe = load_pipeline(request.model, device=request.device, dtype=request.dtype)
        for note in prompt_notes(pipe, settings):
            notes.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
        run = {"device": str(pipe.device), "dtype": _dtype_name(request)}
        with _progress_bars(notes) as progress:
            result = compare(pipe, settings, progress) if request.compare else generate(pipe, settings, progress)
    _write(result, files, run)
    print_result(_judge(pipe, result, files, run, notes))
    print_files(files)


def _check(request: Request, *, create: bool) -> tuple[Any, GenerateSettings, list[Path]]:
    """Everything that can be wrong is found here, before weights are read; returns a skeleton of the pipeline."""
    if request.compare not in (None, "dense"):
        raise ConfigError(f"--compare takes 'dense', not {request.compare!r}")
    config = method_config(request.method, request.window, request.density)
    if request.compare and config.method.name == "dense":
        raise ConfigError("--compare dense needs another method than dense")
    resolve_dtype(request.dtype, resolve_device(request.device))
    skeleton = load_skeleton(request.model)
    settings = resolve_settings(skeleton, request.prompt, method=config, model=request.model, **request.wishes)
    call_arguments(skeleton, settings)
    files = [request.out or default_out(settings.prompt, settings.seed)]
    if request.compare:
        files += [files[0].with_stem(f"{files[0].stem}-{kind}") for kind in ("dense", "side-by-side")]
    for creating in (False, True) if create else (False,):  # no folder is made while another file may be refused
        for file in files:
            check_writable(file, create=creating)
            check_sidecar(file, keep=config_file(request.method), create=creating)
    ffmpeg_path()
    return skeleton, settings, files


def _write(result: Clip | Comparison, files: list[Path], run: dict[str, Any]) -> None:
    frames = [clip.frames for clip in _clips(result)]
    if isinstance(result, Comparison):
        frames[2] = side_by_side(frames[1], frames[0], ("dense", result.sparse.settings.method.method.name))
    for file, clip, pictures, record in zip(files, _clips(result), frames, _records(result, run), strict=True):
        write_video(file, pictures, clip.settings.fps, settings=record)


def _judge(
    pipe: Any, result: Clip | Comparison, files: list[Path], run: dict[str, Any], notes: Console
) -> Clip | Comparison:
    """The result with what the clips show, which is also added to the files.

    They are written before, and whatever goes wrong here is only noted: a finished clip is worth more than its verdict.
    """
    try:
        if isinstance(result, Comparison):
            sparse, dense = judged(pipe, result.sparse), judged(pipe, result.dense)
            seen: Clip | Comparison = dataclasses.replace(result, sparse=sparse, dense=dense)
        else:
            seen = judged(pipe, result)
        if _clips(seen)[0].content is not None:
            for file, record in zip(files, _records(seen, run), strict=True):
                write_settings(file, record)
    except Exception as error:
        text = f"note: the clip is written, but could not be judged: {str(error) or type(error).__name__}"
        notes.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        return result
    return seen


def _clips(result: Clip | Comparison) -> list[Clip]:
    """The clip that each file is about; that with both side by side is about the sparse one."""
    return [result.sparse, result.dense, result.sparse] if isinstance(result, Comparison) else [result]


def _records(result: Clip | Comparison, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each file, with how the run went."""
    records = []
    for number, clip in enumerate(_clips(result)):
        report = None if clip.summary is None else clip.summary.to_dict()
        record = {**run, "seconds": clip.seconds, "summary": report, "content": clip.content}
        if isinstance(result, Comparison) and number != 1:
            record["comparison"] = result.to_dict()
        records.append({**clip.settings.to_dict(), "run": record})
    return records


@contextmanager
def _progress_bars(console: Console) -> Iterator[Any]:
    """A bar for each phase, on stderr: steps done, time taken, time left. Into a file or pipe, a line instead."""
    if not console.is_terminal:
        yield _progress_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield progress


def _progress_lines(console: Console) -> Any:
    def progress(phase: str, done: int, total: int) -> None:
        if done in (0, total):
            console.print(f"{phase} {done}/{total}", highlight=False)

    return progress


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Their progress bars and hints would run through ours; downloads keep theirs."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    for library in loggers:
        library.disable_progress_bar()
    levels = [library.get_verbosity() for library in loggers]
    for library in loggers:
        library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _dtype_name(request: Request) -> str:
    return str(resolve_dtype(request.dtype, resolve_device(request.device))).removeprefix("torch.")
