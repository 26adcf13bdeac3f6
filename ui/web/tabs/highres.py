"""The high-resolution tab: shows the native clip as soon as it is finished, then the clip at the target size."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.batch.manifest import NAME
from tilewise.pipelines.batch.two_stage_clip import TwoStages
from tilewise.pipelines.batch.two_stage_jobs import stages_flop, stages_of
from tilewise.pipelines.conditioning.inputs import Inputs, input_notes
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.resolve import prompt_notes
from tilewise.pipelines.highres.preparation import Work
from tilewise.pipelines.loading.device import resolve_dtype
from tilewise.pipelines.loading.load import cast_skeleton, load_skeleton
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.memory.limits import PeakMemory
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.common.summary_table import summary_html
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.highres_form import (
    OPTIONS,
    HighresRequest,
    command_line,
    highres_request,
    plan_html,
    planned,
    python_program,
    request_from,
    settings_dict,
)
from tilewise.ui.web.forms.option_controls import control
from tilewise.ui.web.forms.plan_panel import plan_html as one_stage_html
from tilewise.ui.web.forms.slider import Slider
from tilewise.ui.web.jobs.clips import find_clip
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.jobs.output_store import OutputStore
from tilewise.ui.web.tabs.generate import again_box
from tilewise.ui.web.tabs.highres_one_stage import SETTINGS, OneStage
from tilewise.ui.web.tabs.highres_result import figure, stages_html
from tilewise.ui.web.tabs.job_view import QUIET, JobView

MAIN = ("strength", "refresh", "global_path", "guided")  # options that are shown at once
KIND = "highres"
FOLDER = "highres"  # of the output folder
CANCELLED = "cancelled; a native clip that was finished is kept"
ABOUT = """The settings, attention method included, make a clip at the model's own size. The clip at the target size
starts from it: each query attends to a window of the native size, guided by a path that sees the whole frame. Both clips are
written to the folder `highres` of the outputs. Pictures of Stable Diffusion 1.5, 2.1 and XL are made in one stage, by the preset
`hidiffusion`: they take no options of a second stage, and the method beside this tab is not theirs."""


@dataclasses.dataclass(frozen=True)
class HighresMade:
    """Both clips on disk. path: of the clip at the target, whose metadata names the native one's file."""

    work: Work
    path: Path
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class NativeShown:
    """The first clip, while the second is made."""

    html: str


class HighresStudio:
    """Makes clips of two stages into a folder of `outputs`."""

    def __init__(self, models: Models, outputs: Path) -> None:
        self.models, self.outputs, self.store = models, outputs, OutputStore(models, outputs / FOLDER)
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
        notes = [*prompt_notes(pipe, work.target), *work.notes, *input_notes(pipe, Inputs.of(work.target))]
        run = {name: value for name, value in told.items() if name != "load"}  # of both clips

        def show(native: Mapping[str, Any]) -> None:
            words = f"native stage, {native['height']}×{native['width']}; the target follows"
            version = native["run"]["frames_sha256"][:12]
            job.show(NativeShown(figure(stages.native_path, words, native["prompt"], version)))
            job.keep(native=stages.native_path.relative_to(self.outputs).as_posix())

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
        return HighresMade(work, path, metadata)


class HighresTab:
    """Built inside a gr.Tab, which is `tab`."""

    def __init__(
        self, controls: Controls, job_queue: JobQueue, models: Models, outputs: Path, tab: gr.Tab, job: Any
    ) -> None:
        self.controls, self.job_queue, self.models = controls, job_queue, models
        self.studio = HighresStudio(models, outputs)
        self.one = OneStage(models, controls.limits, outputs)
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
            go = gr.Button("Generate in high resolution", variant="primary", elem_id="highres")
            stop = gr.Button("Cancel", elem_id="highres-cancel", interactive=False)
        status = gr.HTML(elem_id="highres-status")
        native = gr.HTML(elem_id="highres-native")
        result = gr.HTML(elem_id="highres-result")
        with gr.Accordion("Summary: what the attention calls of the second stage did", open=False):
            summary = gr.HTML(elem_id="highres-summary")
        settings, command, program = again_box("highres-")
        made = dict(zip((*MAIN, *(name for name in OPTIONS if name not in MAIN)), [*first, *more], strict=True))
        self.own = own = [height, width, *(made[name] for name in OPTIONS)]  # in the order of FIELDS
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        inputs = [*own, *controls.inputs]
        begun = gr.State(False)  # whether the tab was ever shown: planning takes its time
        tab.select(lambda: True, None, begun, **QUIET)  # Gradio tells of a State's change from its queue alone
        anew: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        moved = [begun.change, *(component.change for component in own)]
        gr.on(moved, self.plan, [begun, *inputs], [plan], **anew)
        controls.moved.then(self.plan, [begun, *inputs], [plan], **anew)
        model = controls.components["model"]
        model.input(self.target, [model], [height, width], **quiet)
        job_queue.register(KIND, self.work)
        nothing = ["", "", None, None, None]
        self.view = JobView(job_queue, KIND, job, self.start, self.result, nothing, CANCELLED)
        self.view.wire(go, stop, inputs, status, native, [result, summary, settings, command, program])

    def target(self, model: str) -> list[Any]:
        """Twice the model's own size."""
        try:
            native = self.models.defaults(str(model))
        except TilewiseError:
            return [gr.skip()] * 2
        return [2 * native.height, 2 * native.width]

    def plan(self, begun: bool, *given: Any) -> Any:
        if not begun:
            return gr.skip()
        try:
            values = {**self._values(given), "prompt": "-"}
            if self.one.serves(str(values["model"])):
                return one_stage_html(self.models, self.one.settings(values, given[: len(self.own)]))
            return plan_html(
                self._planned(given, prompt="-")[1], self.studio.skeleton(str(self._values(given)["model"]))
            )
        except Exception as error:
            log_unexpected(error)
            return error_html(error)

    def start(self, *given: Any) -> tuple[str, dict[str, Any]]:
        values = self._values(given)
        if self.one.serves(str(values["model"])):
            settings = self.one.settings(values, given[: len(self.own)])
            return settings.prompt[:200], {SETTINGS: settings.to_dict()}
        clip_request, _ = self._planned(given)
        return clip_request.native.prompt[:200], clip_request.to_dict()

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        if SETTINGS in values:
            return self.one.work(values, job)
        clip_request = request_from(values, self.models, self.controls.limits)
        self._plan_of(clip_request)
        made = self.studio.clip(clip_request, job)
        return {"clip": made.path.relative_to(self.studio.outputs).as_posix()}

    def result(self, job: Job) -> list[Any]:
        """Result, summary, settings, command, program. A native clip that was finished is shown, whatever became of the other."""
        if job.status != DONE:
            if "native" not in job.result:
                return self.view.nothing
            first = find_clip(self.studio.outputs, job.result["native"])
            told = first.settings
            words = f"native stage, {told.height}×{told.width}"
            return [figure(first.path, words, told.prompt, first.run["frames_sha256"][:12]), *self.view.nothing[1:]]
        if SETTINGS in job.values:
            return self.one.result(job)
        made = find_clip(self.studio.outputs, job.result["clip"])
        work = self._plan_of(request_from(job.values, self.models, self.controls.limits))
        native, dtype = self.models.defaults(work.native.model), self.models.dtype
        told_settings = json.dumps(settings_dict(work), indent=2)
        again = [command_line(work, native, dtype), python_program(work, native, dtype)]
        metadata = {**made.settings.to_dict(), "run": made.run}
        return [stages_html(made.path, metadata), summary_html(made.run.get("summary")), told_settings, *again]

    def _values(self, given: Any) -> dict[str, Any]:
        return self.controls.values(given[len(self.own) :])

    def _planned(self, given: Any, prompt: str = "") -> tuple[HighresRequest, Work]:
        """prompt: where there is none."""
        values, limits = self._values(given), self.controls.limits
        values["prompt"] = values["prompt"] or prompt
        clip_request = highres_request(self.models, limits, values, given[: len(self.own)])
        return clip_request, self._plan_of(clip_request)

    def _plan_of(self, clip_request: HighresRequest) -> Work:
        skeleton = self.studio.skeleton(clip_request.native.model)
        return planned(self.models, self.controls.limits, clip_request, skeleton)
