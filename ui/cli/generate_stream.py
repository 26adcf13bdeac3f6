"""`tilewise generate --stream`: a video of any length, into a file that plays while it grows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import typer

from tilewise.pipelines.generation.clip_metadata import ClipMetadata, begin_run
from tilewise.pipelines.generation.resolve import prompt_notes
from tilewise.pipelines.generation.settings import DEFAULT_MODEL
from tilewise.pipelines.highres.settings import HIGHRES, TWO_STAGE_OPTIONS
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.load import cast_skeleton, load_skeleton
from tilewise.pipelines.media.files import is_still
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.memory.options import MEMORY_OPTIONS
from tilewise.pipelines.options import field_values
from tilewise.pipelines.streaming.preparation import (
    SHARED,
    StreamWork,
    check_memory,
    explain_work,
    load,
    prepare,
    stream_of,
)
from tilewise.pipelines.streaming.record import Recorded, record
from tilewise.pipelines.streaming.settings import StreamSettings, not_of_streams, stream_window
from tilewise.pipelines.streaming.video_in import file_notes
from tilewise.pipelines.streaming.windows.plan import window_notes
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.interrupts import Interrupts
from tilewise.ui.cli.progress import quiet_libraries
from tilewise.ui.cli.request import Request, print_same_frames
from tilewise.ui.cli.stream_progress import stream_progress
from tilewise.ui.common.exit_codes import INTERRUPTED
from tilewise.ui.common.options import method_config
from tilewise.ui.common.tables import print_files, print_settings, print_stream
from tilewise.ui.common.terminal import say, standard_error

REFUSED = {
    **dict.fromkeys(
        MEMORY_OPTIONS, "a stream keeps all of the model on the device, and says how much memory its cache takes"
    ),
    HIGHRES.name: "one stage makes a stream",
    **dict.fromkeys(TWO_STAGE_OPTIONS, "it is an option of --highres"),
}


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A checked request. skeleton: the pipeline without weights."""

    work: StreamWork
    outputs: Outputs
    dtype: str
    origin: ClipMetadata | None
    skeleton: Any


def dry_run_stream(request: Request) -> None:
    """Prints the settings and the recipe. Nothing is written, and no weights are read."""
    found = _check(request, create=False)
    print_settings(found.work.settings, str(resolve_device(request.device)), found.dtype, found.outputs.files)
    if found.work.cache is not None:
        say(f"causal checkpoint: {found.work.checkpoint or 'the weights of the model'}")
        say(found.work.recipe)
    explanation = explain_work(found.skeleton, found.work, resolve_device(request.device))
    say(explanation)
    for note in file_notes(found.skeleton, found.work.settings, found.work.recipe.fps):
        say(f"note: {note}")
    for time, prompt in found.work.options.prompts():
        say(f"from {time:g} s on: {prompt}")
    explanation.memory.check()


def generate_stream(request: Request) -> None:
    """Makes the video and reports. Ctrl-C ends it after the chunk under way, with exit code 130."""
    notes = standard_error()
    with quiet_libraries():
        found = _check(request, create=True)
        work = found.work
        with notes.status(f"loading {work.settings.model} …"):
            read = functools.partial(load, work, device=request.device, dtype=found.dtype)
            pipe, run = begin_run(work.settings.model, found.dtype, read)
        for prompt in [work.settings.prompt, *(prompt for _, prompt in work.options.prompts())]:
            for note in prompt_notes(pipe, dataclasses.replace(work.settings, prompt=prompt)):
                notes.note(note)
        recipe = work.recipe
        for note in window_notes(pipe, recipe) if isinstance(recipe, WindowRecipe) else []:
            notes.note(note)
        for note in file_notes(pipe, work.settings, recipe.fps):
            notes.note(note)

        def tell(text: str) -> None:
            notes.print(text, soft_wrap=True)

        with (
            Interrupts(tell, "chunk") as interrupts,
            stream_progress(notes, work.settings.fps) as progress,
            found.outputs.claimed() as files,
        ):
            interrupts.finish_first(True)
            made = record(pipe, work, files[0], run, progress=progress, stop=interrupts.asked)
    if made.note is not None:
        notes.note(f"the video is written; the settings in it are those from its beginning: {made.note}")
    for prompt in made.unused if made.frames == work.settings.frames else []:
        notes.note(f"the prompt {prompt!r} was to come after the last chunk had begun, and shows nowhere")
    print_stream(made)
    print_files(files)
    if made.frames < work.settings.frames:
        notes.note(f"interrupted after {made.frames} of {counted(work.settings.frames, 'frame')}; the file is complete")
        raise typer.Exit(INTERRUPTED)
    if found.origin is not None and _is_the_same(made, found.origin):
        print_same_frames(made.frames_sha256, found.origin, request.source)


def _check(request: Request, *, create: bool) -> _Checked:
    """Everything that can be wrong is found here, before weights are read."""
    given = request.options
    if request.compare is not None:
        raise ConfigError("--compare cannot be used with --stream")
    for name, reason in {**not_of_streams(given), **REFUSED}.items():
        if name in given:
            raise ConfigError(f"--{name.replace('_', '-')} cannot be used with --stream: {reason}")
    origin = request.origin()
    earlier: dict[str, Any] = {}
    before, recipe = StreamSettings(), None
    if origin is not None:
        if "stream" not in origin.run:
            raise ConfigError(
                f"{request.source} is no stream, and cannot be made again as one: leave --stream or --from out"
            )
        before, recipe = stream_of(origin.run["stream"])
        earlier = vars(origin.settings)
    named = dict(given)
    if "window" in named:
        named["window"] = stream_window(named["window"])
    options = dataclasses.replace(before, **field_values(StreamSettings, named))
    if {"causal", "recipe", "lora", "model", "way"} & set(given):
        recipe = None  # another checkpoint has its own
    shared = {name: {**earlier, **given}[name] for name in SHARED if name in {**earlier, **given}}
    prompt = earlier.get("prompt") if request.prompt is None else request.prompt
    if prompt is None:
        raise ConfigError(
            "there is no prompt: say what the video should show, or name a stream to make again with --from"
        )
    dtype = request.dtype(origin)
    of_method = {name: value for name, value in given.items() if name != "window"}  # which is the stream's
    method = method_config(given.get("method", earlier.get("method", "dense")), of_method)
    model = shared.pop("model", DEFAULT_MODEL)
    skeleton = cast_skeleton(load_skeleton(model), getattr(torch, dtype))
    work = prepare(
        skeleton, prompt, options, model=model, method=method, recipe=recipe, guidance=given.get("guidance"), **shared
    )
    if request.out is not None and is_still(request.out):
        raise ConfigError(f"a stream is written as .mp4, not {request.out}")
    # An .mp4 even of one frame: a picture cannot grow.
    if create:
        check_memory(skeleton, work, resolve_device(request.device))
    outputs = request.outputs(work.settings, create=create, suffix=".mp4")
    return _Checked(work, outputs, dtype, origin, skeleton)


def _is_the_same(made: Recorded, origin: ClipMetadata) -> bool:
    """Whether a stream was made by the same settings as the one of --from."""
    return made.work.settings == origin.settings and made.work.to_dict() == origin.run.get("stream")
