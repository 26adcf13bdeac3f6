"""The generation tab: make one clip with a live preview; download it, or copy its settings, command or program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from tilewise.plugins.text_format import counted
from tilewise.ui.common.tables import content_words, method_words
from tilewise.ui.web.common import media
from tilewise.ui.web.common.summary_table import summary_html
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_from, settings_of
from tilewise.ui.web.forms.snippets import command_line, python_program
from tilewise.ui.web.jobs.clips import Made, Studio
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.examples import Examples
from tilewise.ui.web.tabs.job_view import JobView

KIND = "generate"


class GenerateTab:
    """Built inside a gr.Tab. `clip`: a gr.State with the path of the visitor's last clip, as text.

    go, stop: the buttons, which stand under the prompt, where every tab has them.
    """

    def __init__(
        self, controls: Controls, job_queue: JobQueue, studio: Studio, clip: gr.State, job: Any, go: Any, stop: Any
    ) -> None:
        self.controls, self.studio = controls, studio
        self.examples = Examples(controls, job)
        status = gr.HTML(elem_id="status")
        preview = gr.HTML(elem_id="preview")
        result = gr.HTML(elem_id="result")
        with gr.Accordion("Summary: what the attention calls did", open=False, elem_id="summary-box"):
            summary = gr.HTML(elem_id="summary")
        settings, command, program = again_box()
        job_queue.register(KIND, self.work)
        nothing = ["", "", None, None, None, gr.skip()]
        self.view = JobView(job_queue, KIND, job, self.start, self.result, nothing)
        self.view.wire(go, stop, controls.inputs, status, preview, [result, summary, settings, command, program, clip])

    def start(self, *given: Any) -> tuple[str, dict[str, Any]]:
        controls = self.controls
        settings = settings_of(controls.models, controls.limits, controls.values(given))
        check_fits(controls.models, settings)
        return settings.prompt[:200], {"settings": settings.to_dict()}

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        settings = settings_from(values["settings"], self.controls.models, self.controls.limits)
        self.controls.limits.check(settings)
        check_fits(self.controls.models, settings)
        return {"clip": self.studio.name(self.studio.clip(settings, job))}

    def result(self, job: Job) -> list[Any]:
        """Result, summary, settings, command, program, clip."""
        if job.status != DONE:
            return self.view.nothing
        made = self.studio.find(job.result["clip"])
        return [*made_again(made, self.controls.models), str(made.path)]


def made_again(made: Made, models: Models) -> list[Any]:
    """What is shown of a clip in one stage: result, summary, settings, command, program."""
    native = models.defaults(made.settings.model)
    command = command_line(made.settings, native, models.dtype, made.path)
    program = python_program(models.skeleton(made.settings.model), made.settings, models.dtype)
    told = json.dumps(made.settings.to_dict(), indent=2)
    return [result_html(made), summary_html(made.run.get("summary")), told, command, program]


def again_box(prefix: str = "") -> tuple[gr.Code, gr.Code, gr.Code]:
    """Settings, command and program of a clip; prefix: of the element ids."""
    box = f"{prefix}again" if prefix else "again-box"
    with gr.Accordion("The same clip again: command, program, settings", open=False, elem_id=box):
        command = gr.Code(
            language="shell", label="Command", interactive=False, wrap_lines=True, elem_id=f"{prefix}command"
        )
        program = gr.Code(
            language="python", label="Python", interactive=False, wrap_lines=True, elem_id=f"{prefix}program"
        )
        settings = gr.Code(
            language="json", label="Settings as JSON", interactive=False, wrap_lines=True, elem_id=f"{prefix}settings"
        )
    return settings, command, program


def result_html(made: Made) -> str:
    """The clip with what is worth knowing about it."""
    run, settings = made.run, made.settings
    version = run["frames_sha256"][:12]
    size = f"{counted(settings.frames, 'frame')} of {settings.height}×{settings.width}"
    if settings.frames > 1:
        size += f", {settings.fps:g} a second"
    rows = [
        ("clip", escape(f"{size}, seed {settings.seed}")),
        ("method", escape(method_words(settings.method))),
        ("seconds", escape(", ".join(f"{name} {value:.2f}" for name, value in run["seconds"].items() if value))),
        *media.run_share_rows(run),
        ("fallbacks to dense", escape(fallback_words(run["fallbacks"]))),
    ]
    if run.get("peak_memory", {}).get("bytes"):
        rows.append(("peak memory", escape(f"{media.size(run['peak_memory']['bytes'])} ({run['peak_memory']['of']})")))
    if run.get("content"):
        rows.append(("prompt shown", escape(content_words(run["content"], settings.prompt))))
    notes = "".join(f"<p>{escape(note)}</p>" for note in run.get("notes", ()))
    player = media.video(made.path, f"the clip: {settings.prompt}", version=version)
    return f'<div class="tw-result">{player}<div>{media.table(rows)}{notes}{media.download(made.path)}</div></div>'


def fallback_words(fallbacks: Mapping[str, int]) -> str:
    return "; ".join(f"{counted(n, 'call')}: {why}" for why, n in fallbacks.items()) or "none"
