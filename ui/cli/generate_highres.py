"""`tilewise generate --highres`: a clip at the model's own size, then one at the target size. Both are written."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch.job import Stages
from tilewise.pipelines.batch.two_stage_jobs import stages_of
from tilewise.pipelines.conditioning.inputs import Inputs, input_notes
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import ClipMetadata, begin_run, clip_metadata
from tilewise.pipelines.generation.generate import Clip
from tilewise.pipelines.generation.resolve import explain_settings, prompt_notes
from tilewise.pipelines.generation.settings import DEFAULT_MODEL, GenerateSettings
from tilewise.pipelines.highres.one_stage import METHOD, refuse_stages
from tilewise.pipelines.highres.one_stage import in_one_stage as is_one_stage
from tilewise.pipelines.highres.preparation import SHARED_BY_STAGES, Work, prepare
from tilewise.pipelines.highres.settings import HIGHRES, TWO_STAGE_OPTIONS, HighresSettings
from tilewise.pipelines.highres.two_stages import HighresClip, add_content_score, make
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.load import cast_skeleton, load_pipeline, load_skeleton
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.media.rescue import write_or_rescue
from tilewise.pipelines.media.video import write_settings
from tilewise.pipelines.memory.options import MemoryOptions, check_memory
from tilewise.pipelines.memory.retry import within_memory
from tilewise.pipelines.options import field_values, parse_size
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.cli.request import Request, print_sameness
from tilewise.ui.common.options import first_stage_method
from tilewise.ui.common.tables import print_files, print_result, print_settings
from tilewise.ui.common.terminal import Terminal, say, standard_error, standard_output


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A checked request. arguments: of `prepare`, for the loaded pipeline. outputs: the clip, and its native
    stage's."""

    skeleton: Any
    work: Work
    arguments: tuple
    outputs: Outputs
    dtype: str
    origin: ClipMetadata | None
    memory: MemoryOptions


def dry_run_highres(request: Request) -> None:
    """Prints both stages' settings and the plan of memory. Nothing is written, and no weights are read."""
    found = _check(request, create=False)
    device = str(resolve_device(request.device))
    target, native = found.outputs.files
    print_settings(found.work.native, device, found.dtype, [native])
    print_settings(found.work.target, device, found.dtype, [target])
    say(explain_settings(found.skeleton, found.work.target))
    say(f"{found.work.plan}; without the text encoder, which was not loaded")
    for note in [*found.work.notes, *input_notes(found.skeleton, Inputs.of(found.work.target))]:
        say(f"note: {note}")


def generate_highres(request: Request) -> None:
    """Makes both clips and reports. The native one is written as soon as it is there: it stays if the rest is stopped."""
    notes = standard_error()
    with quiet_libraries():
        found = _check(request, create=True)
        model = found.work.target.model
        with notes.status(f"loading {model} …"):
            load = functools.partial(
                load_pipeline, model, device=request.device, dtype=found.dtype, offload=found.memory.offload,
                loras=found.work.target.lora,
            )  # fmt: skip
            pipe, run = begin_run(model, found.dtype, load)
        work = _tiled(prepare(pipe, *found.arguments), found.origin, found.memory)
        target = work.target
        notes.print(str(work.plan), style="yellow", soft_wrap=True)
        for note in [*prompt_notes(pipe, target), *work.notes, *input_notes(pipe, Inputs.of(target))]:
            notes.note(note)

        with found.outputs.claimed() as files:

            def write_native(clip: Clip) -> None:
                write_or_rescue(files[1], clip.frames, clip.settings.fps, settings=clip_metadata(clip, run))

            with progress_bars(notes) as progress:

                def make_both() -> HighresClip:
                    with cancellable(pipe):
                        return make(pipe, work, progress, write_native)

                taken = [
                    name for name, on in (("vae-tiling", work.plan.vae_tiling), ("offload", work.plan.offload)) if on
                ]
                made, run["memory_saving"], run["oom_retries"] = within_memory(
                    pipe, make_both, retry=found.memory.retry_oom, taken=taken, note=notes.note
                )
                run["offload"] = found.memory.offload
            write_or_rescue(files[0], made.frames, target.fps, settings=_metadata(made, run))
    made = _score_content(pipe, made, files, run, notes)
    print_result(made.clip)
    _print_stages(made)
    print_files(files)
    if found.origin is not None and _is_the_same(work, found.origin):
        print_sameness(made.clip, found.origin, request.source)


def in_one_stage(request: Request) -> Request:
    """The request of a UNet's clip without --highres: a method makes it at the target's size, in one stage. Others as they are.

    Raises:
        ConfigError: for options of two stages.
    """
    options = request.options
    if not options.get(HIGHRES.name):
        return request
    origin = request.origin()
    model = options.get("model") or (origin.settings.model if origin is not None else DEFAULT_MODEL)
    if not is_one_stage(load_skeleton(model)):
        return request
    refuse_stages([name for name in TWO_STAGE_OPTIONS if name in options], flags=True)
    kept = {name: value for name, value in options.items() if name != HIGHRES.name}
    if "method" not in kept:
        kept["method"] = METHOD
    return dataclasses.replace(request, options=kept)


def _check(request: Request, *, create: bool) -> _Checked:
    """Everything that can be wrong is found here, before weights are read."""
    given = request.options
    if request.compare is not None:
        raise ConfigError("--compare cannot be used with --highres")
    origin = request.origin()
    earlier = {} if origin is None else _earlier(origin)
    native: Any = earlier.pop("native", None)
    if "native" in given:
        native = parse_size(given["native"])
    options = HighresSettings(**{**earlier.pop("options", {}), **field_values(HighresSettings, given)})
    shared = {**earlier, **request.settings}
    prompt = request.prompt or shared.pop("prompt", None)
    height, width = shared.pop("height", None), shared.pop("width", None)
    if prompt is None or height is None or width is None:
        raise ConfigError(
            "--highres needs a prompt, --height and --width, or with --from a clip that was made with them"
        )
    dtype = request.dtype(origin)
    model = shared.get("model", DEFAULT_MODEL)
    skeleton = cast_skeleton(load_skeleton(model), getattr(torch, dtype))
    method = first_stage_method(shared.get("method", "dense"), given)
    both = {"model": model, **{name: shared[name] for name in SHARED_BY_STAGES if name in shared}}
    memory = request.memory(origin)
    check_memory(skeleton, memory, resolve_device(request.device))
    arguments = (prompt, height, width, native, method, options, both)
    work = prepare(skeleton, *arguments, resolve_device(request.device))
    outputs = request.outputs(work.target, "-native", create=create)
    return _Checked(skeleton, work, arguments, outputs, dtype, origin, memory)


def _earlier(origin: ClipMetadata) -> dict[str, Any]:
    """What the clip of --from was made with: of two stages both, of one stage what becomes the native stage here."""
    settings = dict(vars(origin.settings))
    told = origin.run.get("highres")
    if told is None:
        size = (settings.pop("height"), settings.pop("width"))
        return {**settings, "native": size}
    stages = Stages.from_dict(told)
    native = (stages.height, stages.width)
    return {**settings, "method": stages.method, "native": native, "options": stages.options.to_dict()}


def _tiled(work: Work, origin: ClipMetadata | None, memory: MemoryOptions) -> Work:
    """With the VAE in tiles where that was asked for, or was so for the clip of --from: they show in the pixels."""
    told = None if origin is None else origin.run.get("highres")
    if origin is None or told is None or _size(origin.settings) != _size(work.target):
        told = {"plan": {}}
    tiles = {
        name: getattr(work.plan, name) or memory.vae_tiling or bool(told["plan"].get(name))
        for name in ("vae_tiling", "native_tiling")
    }
    return dataclasses.replace(work, plan=dataclasses.replace(work.plan, **tiles))


def _size(settings: GenerateSettings) -> tuple[int, int, int]:
    return settings.height, settings.width, settings.frames


def _is_the_same(work: Work, origin: ClipMetadata) -> bool:
    """Whether a clip is made by the same two stages as the one of --from."""
    told = origin.run.get("highres")
    return told is not None and Stages.from_dict(told).to_dict() == stages_of(work).to_dict()


def _metadata(made: HighresClip, run: dict[str, Any]) -> dict[str, Any]:
    return clip_metadata(made.clip, {**run, "highres": made.to_dict()})


def _score_content(
    pipe: Any, made: HighresClip, files: list[Path], run: dict[str, Any], notes: Terminal
) -> HighresClip:
    """With what the clips show, which is also added to their files; what goes wrong here is only noted."""
    try:
        seen = add_content_score(pipe, made)
        if seen.clip.content is not None:
            write_settings(files[0], _metadata(seen, run))
            write_settings(files[1], clip_metadata(seen.native, run))
        return seen
    except Exception as error:
        notes.note(f"the clips are written, but could not be scored: {str(error) or type(error).__name__}")
        return made


def _print_stages(made: HighresClip) -> None:
    forwards = made.forwards
    print_to = standard_output()
    print_to.print(str(made.coherence), soft_wrap=True)
    print_to.print(
        f"forwards at the target: {forwards['refreshed']} with the full path, {forwards['reused']} with its cached "
        f"cross-attention, {forwards['unguided']} by the window alone; native stage {made.native.seconds['total']:.2f} s",
        soft_wrap=True,
    )
