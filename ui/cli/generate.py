"""`tilewise generate`: check the request, load the model, generate, write, report."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from tilewise import __version__
from tilewise.pipelines.conditioning.inputs import Inputs, input_notes
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import ClipMetadata, begin_run, clip_metadata
from tilewise.pipelines.generation.compare import Comparison, compare, side_by_side
from tilewise.pipelines.generation.generate import Clip, add_content_score, generate
from tilewise.pipelines.generation.resolve import explain_settings, prompt_notes, resolve_settings
from tilewise.pipelines.generation.settings import DEFAULT_METHOD, DEFAULT_MODEL, GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import size_notes
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.media.rescue import write_or_rescue
from tilewise.pipelines.media.video import write_settings
from tilewise.pipelines.memory.estimate import estimate_memory
from tilewise.pipelines.memory.fit import check_fit, memory_words
from tilewise.pipelines.memory.options import MemoryOptions, check_memory
from tilewise.pipelines.memory.plan import device_bytes
from tilewise.pipelines.memory.retry import within_memory
from tilewise.pipelines.memory.units import gib
from tilewise.pipelines.parallel.ranks import Ranks, joined
from tilewise.pipelines.parallel.world import World, world_from_environment
from tilewise.plugins.errors import ConfigError
from tilewise.ui.cli.generate_highres import dry_run_highres, generate_highres, in_one_stage
from tilewise.ui.cli.generate_stream import dry_run_stream, generate_stream
from tilewise.ui.cli.parallel import (
    check_parallel,
    facts_of,
    notes_of,
    own_request,
    print_shares,
    refuse_parallel,
    shares_of,
)
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.cli.request import Request, print_sameness
from tilewise.ui.common.options import method_config, refuse_stream_options, refuse_two_stage_options
from tilewise.ui.common.tables import print_files, print_result, print_settings
from tilewise.ui.common.terminal import Terminal, say

ALONE = Ranks(World())


@dataclasses.dataclass(frozen=True)
class Work:
    """A checked request. skeleton: the pipeline without weights. outputs: what will be written. dtype: by name. origin: what the
    clip of --from says."""

    skeleton: Any
    settings: GenerateSettings
    outputs: Outputs
    dtype: str
    origin: ClipMetadata | None
    memory: MemoryOptions


def dry_run_request(request: Request) -> None:
    """Prints the settings and what the method would do. Nothing is written, and no weights are read."""
    request = in_one_stage(_followed(request))
    if request.options.get("stream"):
        dry_run_stream(request)
        return
    if request.options.get("highres"):
        dry_run_highres(request)
        return
    work = _check(request, create=False)
    device = resolve_device(request.device)
    print_settings(work.settings, str(device), work.dtype, work.outputs.files)
    explanation = explain_settings(work.skeleton, work.settings)
    say(explanation)
    memory = estimate_memory(work.skeleton, work.settings, explanation, getattr(torch, work.dtype))
    say(f"memory: about {gib(memory.total)} of {gib(device_bytes(device))} ({memory_words(memory)})")
    files = input_notes(work.skeleton, Inputs.of(work.settings))
    for note in [*memory.notes, *files, *_size_notes(work)]:
        say(f"note: {note}")


def generate_request(request: Request) -> None:
    """Makes the clip, or with --compare both clips, and reports. Started by torchrun, its processes make one clip together."""
    with joined(world_from_environment(), request.device) as ranks:
        request = ranks.together(lambda: in_one_stage(_followed(own_request(request, ranks))))
        ranks.together(lambda: refuse_parallel(request, ranks))
        if request.options.get("stream"):
            generate_stream(request)
        elif request.options.get("highres"):
            generate_highres(request)
        else:
            _generate(request, ranks)


def _generate(request: Request, ranks: Ranks) -> None:
    notes = notes_of(ranks)
    with quiet_libraries():
        work = ranks.together(lambda: _check(request, create=ranks.first, ranks=ranks))
        settings = work.settings
        ranks.agree(facts_of(settings, work.dtype, request))
        with notes.status(f"loading {settings.model} …"):
            load = functools.partial(
                load_pipeline, settings.model, device=request.device, dtype=work.dtype, offload=work.memory.offload,
                loras=settings.lora,
            )  # fmt: skip
            pipe, run = ranks.together(lambda: begin_run(settings.model, work.dtype, load))
        ranks.split(pipe, request.parallel)
        warnings = explain_settings(work.skeleton, settings).warnings
        of_files = input_notes(pipe, Inputs.of(settings))
        for note in [*prompt_notes(pipe, settings), *of_files, *_size_notes(work), *warnings, *_origin_notes(work)]:
            notes.note(note)
        with progress_bars(notes) as progress, ranks.exchanging():

            def make() -> Clip | Comparison:
                with cancellable(pipe):
                    if request.compare:
                        return compare(pipe, settings, progress, runs=request.runs)
                    return generate(pipe, settings, progress)

            result, run["memory_saving"], run["oom_retries"] = within_memory(
                pipe, make, work.memory.measures, retry=work.memory.retry_oom, note=notes.note
            )
            run["offload"] = work.memory.offload
            run["gpus"] = ranks.count
            if ranks.count > 1:
                run["parallel"] = request.parallel
            run["ranks"] = shares_of(result, ranks)  # the last that anybody needs of the others
    if not ranks.first:
        return
    with work.outputs.claimed() as files:
        _write(result, files, run)
    print_result(_score_content(pipe, result, files, run, notes))
    print_shares(run["ranks"])
    print_files(files)
    print_sameness(_clips(result)[0], work.origin, request.source)


def _followed(request: Request) -> Request:
    """What was made in two stages, or streamed, is made again so. Raises ConfigError for options of these for another clip."""
    origin = request.origin()
    if request.options.get("stream") or (origin is not None and "stream" in origin.run):
        return dataclasses.replace(request, options={**request.options, "stream": True})
    refuse_stream_options(request.options)
    if origin is not None and "highres" in origin.run:
        return dataclasses.replace(request, options={**request.options, "highres": True})
    refuse_two_stage_options(request.options)
    return request


def _check(request: Request, *, create: bool, ranks: Ranks = ALONE) -> Work:
    """Everything that can be wrong is found here, before weights are read."""
    if request.runs < 1:
        raise ConfigError(f"--runs takes a whole number of at least 1, not {request.runs}")
    if request.runs > 1 and request.compare is None:
        raise ConfigError("--runs is how often --compare times both clips: give --compare dense too")
    if request.compare not in (None, "dense"):
        raise ConfigError(f"--compare takes 'dense', not {request.compare!r}")
    origin = request.origin()
    given = {**({} if origin is None else vars(origin.settings)), **request.settings}
    prompt = given.pop("prompt", None) if request.prompt is None else request.prompt
    if prompt is None:
        raise ConfigError("there is no prompt: say what the clip should show, or name a clip to make again with --from")
    options = request.options
    config = method_config(given.get("method", DEFAULT_METHOD), options)
    if request.compare and config.is_stock:
        raise ConfigError("--compare dense needs another method than dense, or a --cache")
    dtype = request.dtype(origin)
    memory = request.memory(origin)
    model = given.get("model", DEFAULT_MODEL)
    skeleton = load_skeleton(model)
    settings = resolve_settings(skeleton, **{**given, "prompt": prompt, "method": config, "model": model})
    call_arguments(skeleton, settings)
    device = resolve_device(request.device)
    check_memory(skeleton, memory, device)
    check_parallel(skeleton, settings, request, memory, ranks)
    explanation = explain_settings(skeleton, settings)
    check_fit(skeleton, settings, explanation, getattr(torch, dtype), device, memory, ranks.parts(request.parallel))
    endings = ("-dense", "-side-by-side") if request.compare else ()
    return Work(skeleton, settings, request.outputs(settings, *endings, create=create), dtype, origin, memory)


def _size_notes(work: Work) -> list[str]:
    return size_notes(work.skeleton, work.settings.height, work.settings.width, work.settings.frames)


def _origin_notes(work: Work) -> list[str]:
    if work.origin is None or work.origin.version == __version__:
        return []
    return [f"the clip is of tilewise {work.origin.version}, this is {__version__}: it may come out differently"]


def _write(result: Clip | Comparison, files: list[Path], run: dict[str, Any]) -> None:
    frames = [clip.frames for clip in _clips(result)]
    if isinstance(result, Comparison):
        frames[2] = side_by_side(frames[1], frames[0], ("dense", result.sparse.settings.method.label))
    failed: list[OutputError] = []
    for file, clip, pictures, metadata in zip(files, _clips(result), frames, _file_metadata(result, run), strict=True):
        try:
            write_or_rescue(file, pictures, clip.settings.fps, settings=metadata)
        except OutputError as error:
            failed.append(error)
    if failed:
        raise OutputError("\n".join(map(str, failed))) from failed[0]


def _score_content(
    pipe: Any, result: Clip | Comparison, files: list[Path], run: dict[str, Any], notes: Terminal
) -> Clip | Comparison:
    """The result with what the clips show, which is also added to the files.

    They are written before, and whatever goes wrong here is only noted: a finished clip is worth more than its verdict.
    """
    try:
        if isinstance(result, Comparison):
            sparse, dense = add_content_score(pipe, result.sparse), add_content_score(pipe, result.dense)
            seen: Clip | Comparison = dataclasses.replace(result, sparse=sparse, dense=dense)
        else:
            seen = add_content_score(pipe, result)
        if _clips(seen)[0].content is not None:
            for file, metadata in zip(files, _file_metadata(seen, run), strict=True):
                write_settings(file, metadata)
    except Exception as error:
        notes.note(f"the clip is written, but could not be scored: {str(error) or type(error).__name__}")
        return result
    return seen


def _clips(result: Clip | Comparison) -> list[Clip]:
    """The clip that each file is about; that with both side by side is about the sparse one."""
    return [result.sparse, result.dense, result.sparse] if isinstance(result, Comparison) else [result]


def _file_metadata(result: Clip | Comparison, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each file, with how the run went."""
    told = {"comparison": result.to_dict()} if isinstance(result, Comparison) else {}
    return [clip_metadata(clip, run if number == 1 else {**run, **told}) for number, clip in enumerate(_clips(result))]
