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

from tilewise import __version__
from tilewise.pipelines.generation.clip_metadata import Recorded, clip_record, frames_sha256, machine, read_record
from tilewise.pipelines.generation.compare import Comparison, compare, side_by_side
from tilewise.pipelines.generation.generate import Clip, generate, judged
from tilewise.pipelines.generation.settings import GenerateSettings, explain_settings, prompt_notes, resolve_settings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import size_notes
from tilewise.pipelines.media.files import check_sidecar, check_writable
from tilewise.pipelines.media.video import ffmpeg_path, write_settings, write_video
from tilewise.pipelines.memory.limits import possible, saving
from tilewise.plugins.errors import ConfigError
from tilewise.ui.common.options import config_file, default_out, method_config, out_suffix
from tilewise.ui.common.tables import print_files, print_result, print_settings

MODEL, METHOD = "demo", "sta-balanced"  # where nobody says otherwise


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line said; None where it said nothing.

    wishes: settings by name. source: a clip whose settings stand for what is not given, in place of the usual defaults.
    """

    prompt: str | None
    model: str | None
    method: str | None
    window: str | None
    density: float | None
    wishes: dict[str, Any]
    out: Path | None
    compare: str | None
    device: str
    dtype: str | None
    source: Path | None = None
    highres: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """A checked request. skeleton: the pipeline without weights. files: what will be written. dtype: by name. origin: what the
    clip of --from says."""

    skeleton: Any
    settings: GenerateSettings
    files: list[Path]
    dtype: str
    origin: Recorded | None


def dry_run_request(request: Request) -> None:
    """Prints the settings and what the method would do. Nothing is written, and no weights are read."""
    request = _followed(request)
    if request.highres is not None:
        from tilewise.ui.cli.generate_highres import dry_run_highres

        dry_run_highres(request)
        return
    work = _check(request, create=False)
    device = resolve_device(request.device)
    print_settings(work.settings, str(device), work.dtype, work.files)
    print(explain_settings(work.skeleton, work.settings))
    for note in size_notes(work.skeleton, work.settings.height, work.settings.width):
        print(f"note: {note}")


def generate_request(request: Request) -> None:
    """Makes the clip, or with --compare both clips, and reports."""
    request = _followed(request)
    if request.highres is not None:
        from tilewise.ui.cli.generate_highres import generate_highres

        generate_highres(request)
        return
    notes = Console(stderr=True)
    with quiet_libraries():
        work = _check(request, create=True)
        settings = work.settings
        with notes.status(f"loading {settings.model} …"):
            pipe = load_pipeline(settings.model, device=request.device, dtype=work.dtype)
        notes_of_size = size_notes(pipe, settings.height, settings.width)
        for note in [*prompt_notes(pipe, settings), *notes_of_size, *_origin_notes(work)]:
            notes.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
        run = machine(pipe.device, work.dtype)
        # Tiles of the VAE show in the pixels: a clip that was made with them is made again with them.
        measures = [] if work.origin is None else work.origin.run.get("memory_saving", [])
        measures = [measure for measure in measures if measure in possible(pipe)]
        with progress_bars(notes) as progress, saving(pipe, measures):
            result = compare(pipe, settings, progress) if request.compare else generate(pipe, settings, progress)
    _write(result, work.files, {**run, "memory_saving": measures})
    print_result(_judge(pipe, result, work.files, {**run, "memory_saving": measures}, notes))
    print_files(work.files)
    print_sameness(_clips(result)[0], work.origin, request.source)


def _followed(request: Request) -> Request:
    """What was made in two stages is made again in two."""
    if request.source is None or request.highres is not None or "highres" not in read_record(request.source).run:
        return request
    return dataclasses.replace(request, highres={})


def _check(request: Request, *, create: bool) -> Work:
    """Everything that can be wrong is found here, before weights are read."""
    if request.compare not in (None, "dense"):
        raise ConfigError(f"--compare takes 'dense', not {request.compare!r}")
    origin = None if request.source is None else read_record(request.source)
    earlier: dict[str, Any] = {} if origin is None else dict(vars(origin.settings))
    prompt = earlier.pop("prompt", None) if request.prompt is None else request.prompt
    if prompt is None:
        raise ConfigError("there is no prompt: say what the clip should show, or name a clip to make again with --from")
    config = method_config(request.method or earlier.pop("method", METHOD), request.window, request.density)
    if request.compare and config.method.name == "dense":
        raise ConfigError("--compare dense needs another method than dense")
    dtype = request.dtype or (origin.run.get("dtype") if origin else None) or "auto"
    dtype = str(resolve_dtype(dtype, resolve_device(request.device))).removeprefix("torch.")
    model = request.model or earlier.pop("model", MODEL)
    skeleton = load_skeleton(model)
    given = {name: value for name, value in request.wishes.items() if value is not None}
    wishes = {name: value for name, value in earlier.items() if name not in ("prompt", "method", "model")} | given
    settings = resolve_settings(skeleton, prompt, method=config, model=model, **wishes)
    call_arguments(skeleton, settings)
    files = [request.out or default_out(settings.prompt, settings.seed, settings.frames)]
    if request.compare:
        files += [files[0].with_stem(f"{files[0].stem}-{kind}") for kind in ("dense", "side-by-side")]
    if request.source is not None and any(file.exists() and file.samefile(request.source) for file in files):
        raise ConfigError(f"the clip of --from, {request.source}, would be replaced; give another --out")
    for creating in (False, True) if create else (False,):  # no folder is made while another file may be refused
        for file in files:
            check_writable(file, suffix=out_suffix(file, settings), create=creating)
            check_sidecar(file, keep=None if request.method is None else config_file(request.method), create=creating)
    ffmpeg_path()
    return Work(skeleton, settings, files, dtype, origin)


def _origin_notes(work: Work) -> list[str]:
    if work.origin is None or work.origin.version == __version__:
        return []
    return [f"the clip is of tilewise {work.origin.version}, this is {__version__}: it may come out differently"]


def print_sameness(clip: Clip, origin: Recorded | None, source: Path | None) -> None:
    """Whether a clip that was made again from another's settings came out as that one."""
    before = None if origin is None else origin.run.get("frames_sha256")
    if origin is None or before is None or clip.settings != origin.settings:
        return
    same = frames_sha256(clip.frames) == before
    made = f"it was made on {origin.run.get('device_name')}, {origin.run.get('dtype')}"
    print(f"frames of {source}: {'the same, bit for bit' if same else f'not the same; {made}'}")


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
    told = {"comparison": result.to_dict()} if isinstance(result, Comparison) else {}
    return [clip_record(clip, run if number == 1 else {**run, **told}) for number, clip in enumerate(_clips(result))]


@contextmanager
def progress_bars(console: Console) -> Iterator[Any]:
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
def quiet_libraries() -> Iterator[None]:
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
