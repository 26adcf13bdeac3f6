"""The high-resolution tab: shows the native clip as soon as it is finished, then the clip at the target size."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.batch.manifest import NAME
from tilewise.pipelines.batch.two_stage_clip import TwoStages
from tilewise.pipelines.batch.two_stage_jobs import stages_flop, stages_of
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.resolve import prompt_notes
from tilewise.pipelines.highres.preparation import Work
from tilewise.pipelines.loading.device import resolve_dtype
from tilewise.pipelines.loading.load import cast_skeleton, load_skeleton
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.highres_form import (
    OPTIONS,
    HighresRequest,
    command_line,
    highres_request,
    plan_html,
    planned,
    python_program,
    settings_dict,
)
from tilewise.ui.web.forms.option_controls import control
from tilewise.ui.web.forms.slider import Slider
from tilewise.ui.web.jobs.job_queue import Job, JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.output_store import OutputStore
from tilewise.ui.web.tabs.highres_result import figure, stages_html
from tilewise.ui.web.tabs.job_stream import cancel, owner_of, stream

MAIN = ("strength", "refresh", "global_path", "guided")  # options that are shown at once
FOLDER = "highres"  # of the output folder
CANCELLED = "cancelled; a native clip that was finished is kept"
ABOUT = """The settings on the left, attention method included, make a clip at the model's own size. The clip at the target size
starts from it: each query attends to a window of the native size, guided by a path that sees the whole frame. Both clips are
written to the folder `highres` of the outputs."""


@dataclasses.dataclass(frozen=True)
class HighresMade:
    """Both clips on disk. path: of the clip at the target, whose metadata names the native one's file."""

    work: Work
    path: Path
    metadata: dict[str, Any]
    summary: str


@dataclasses.dataclass(frozen=True)
class NativeShown:
    """The first clip, while the second is made."""

    html: str


class HighresStudio:
    """Makes clips of two stages into a folder of `outputs`."""

    def __init__(self, models: Models, outputs: Path) -> None:
        self.models, self.store = models, OutputStore(models, outputs / FOLDER)
        self._lock = threading.Lock()
        self._skeletons: dict[str, Any] = {}

    def skeleton(self, model: str) -> Any:
        """With denoisers of the dtype that would run, which the plan of memory counts by. Raises as `Models.skeleton`."""
        self.models.skeleton(model)
        with self._lock:
            if model not in self._skeletons:
                skeleton = load_skeleton(model)  # a copy: others plan with the first one
                dtype = resolve_dtype(self.models.dtype, self.models.device)
                self._skeletons[model] = cast_skeleton(skeleton, dtype)
            return self._skeletons[model]

    def clip(self, clip_request: HighresRequest, job: Job) -> HighresMade:
        """Both clips. On the worker's thread; raises Cancelled soon after the job is cancelled."""
        model = clip_request.native.model
        pipe, told = self.models.begin_run(model, job)
        work = clip_request.work(pipe)
        flop = stages_flop(self.skeleton(model), work)
        with self.store.alone():
            place = self.store.place(work.target, flop, stages_of(work))
        notes = [*prompt_notes(pipe, work.target), *work.notes]
        run = {name: value for name, value in told.items() if name != "load"}  # of both clips

        def show(native: Mapping[str, Any]) -> None:
            words = f"native stage, {native['height']}×{native['width']}; the target follows"
            version = native["run"]["frames_sha256"][:12]
            job.show(NativeShown(figure(stages.native_path, words, native["prompt"], version)))

        stages = TwoStages(self.store.folder / place.file, work, run, show)
        for file in (stages.native_path, self.store.folder / place.file, self.store.folder / NAME):
            check_writable(file, suffix=file.suffix)
        peak = PeakMemory(pipe.device)
        peak.start()
        with cancellable(pipe, job.cancelled):
            clip = stages.make(pipe, job.tell)
        run |= {"load": told["load"], "peak_memory": peak.read(), "notes": notes}
        try:
            clip = stages.score_content(pipe)
        except Exception as error:  # a finished clip is worth more than its verdict
            notes.append(f"the clips could not be scored: {error or type(error).__name__}")
        with self.store.alone():
            path, metadata = self.store.put(place, clip, {**run, "highres": stages.to_dict()})
        return HighresMade(work, path, metadata, str(clip.summary))


class HighresTab:
    """Built inside a gr.Tab, which is `tab`."""

    def __init__(self, controls: Controls, job_queue: JobQueue, models: Models, outputs: Path, tab: gr.Tab) -> None:
        self.controls, self.job_queue, self.models = controls, job_queue, models
        self.studio = HighresStudio(models, outputs)
        gr.Markdown(ABOUT)
        high, wide = self.target(models.names[0])
        with gr.Row():
            height = Slider(16, 4320, high, step=16, label="Target height, pixels", elem_id="highres-height")
            width = Slider(16, 7680, wide, step=16, label="Target width, pixels", elem_id="highres-width")
        with gr.Row():
            first = [control(OPTIONS[name], "highres-") for name in MAIN[:2]]
        with gr.Row():
            first += [control(OPTIONS[name], "highres-") for name in MAIN[2:]]
        with gr.Accordion("More of the second stage", open=False, elem_id="highres-more"):
            more = [control(option, "highres-") for name, option in OPTIONS.items() if name not in MAIN]
        plan = gr.HTML(elem_id="highres-plan")
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="highres")
            stop = gr.Button("Cancel", variant="stop", elem_id="highres-cancel")
        status = gr.HTML(elem_id="highres-status")
        native = gr.HTML(elem_id="highres-native")
        result = gr.HTML(elem_id="highres-result")
        with gr.Accordion("Summary: what the attention calls of the second stage did", open=False):
            summary = gr.Code(language=None, label="Summary", interactive=False, elem_id="highres-summary")
        with gr.Accordion("The same clip again: settings, command, program", open=False, elem_id="highres-again"):
            settings = gr.Code(language="json", label="Settings", interactive=False, elem_id="highres-settings")
            command = gr.Code(language="shell", label="Command", interactive=False, elem_id="highres-command")
            program = gr.Code(language="python", label="Python", interactive=False, elem_id="highres-program")
        made = dict(zip((*MAIN, *(name for name in OPTIONS if name not in MAIN)), [*first, *more], strict=True))
        self.own = own = [height, width, *(made[name] for name in OPTIONS)]  # in the order of FIELDS
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs = [*own, *controls.inputs]
        moved = [tab.select, *(component.change for component in inputs)]
        gr.on(moved, self.plan, inputs, [plan], queue=False, trigger_mode="always_last", **quiet)
        model = controls.components["model"]
        model.input(self.target, [model], [height, width], queue=False, **quiet)
        outputs_ = [status, native, result, summary, settings, command, program]
        go.click(self.run, inputs, outputs_, concurrency_limit=None, **quiet)
        stop.click(self.cancel, None, [status], queue=False, **quiet)

    def target(self, model: str) -> list[Any]:
        """Twice the model's own size."""
        try:
            native = self.models.defaults(str(model))
        except TilewiseError:
            return [gr.skip()] * 2
        return [2 * native.height, 2 * native.width]

    def plan(self, *given: Any) -> str:
        try:
            return plan_html(
                self._planned(given, prompt="-")[1], self.studio.skeleton(str(self._values(given)["model"]))
            )
        except Exception as error:
            log_unexpected(error)
            return error_html(error)

    def run(self, request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        nothing = [gr.skip()] * 5
        try:
            clip_request, _ = self._planned(given)
            work = functools.partial(self.studio.clip, clip_request)
            yield [""] * 7  # what is shown must not be taken for what comes
            for status, native, made in stream(self.job_queue, owner_of(request), work, CANCELLED):
                if made is None:  # the native clip stays, whatever becomes of the other
                    yield [status, native or gr.skip(), *nothing]
                else:
                    yield ["", "", *self.shown(made)]
        except Exception as error:
            log_unexpected(error)
            yield [error_html(error), gr.skip(), *nothing]

    def cancel(self, request: gr.Request) -> Any:
        return cancel(self.job_queue, request)

    def shown(self, made: HighresMade) -> list[Any]:
        """Result, summary, settings, command, program."""
        native, dtype = self.models.defaults(made.work.native.model), self.models.dtype
        told = json.dumps(settings_dict(made.work), indent=2)
        again = [command_line(made.work, native, dtype), python_program(made.work, native, dtype)]
        return [stages_html(made.path, made.metadata), made.summary, told, *again]

    def _values(self, given: Any) -> dict[str, Any]:
        return self.controls.values(given[len(self.own) :])

    def _planned(self, given: Any, prompt: str = "") -> tuple[HighresRequest, Work]:
        """prompt: where there is none."""
        values, limits = self._values(given), self.controls.limits
        values["prompt"] = values["prompt"] or prompt
        clip_request = highres_request(self.models, limits, values, given[: len(self.own)])
        return clip_request, planned(self.models, limits, clip_request, self.studio.skeleton(clip_request.native.model))
