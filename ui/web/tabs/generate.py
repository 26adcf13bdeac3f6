"""The generation tab: make one clip with a live preview; download it, or copy its settings, command or program."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from tilewise.ui.common.tables import content_words, method_words
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_of
from tilewise.ui.web.forms.snippets import command_line, python_program
from tilewise.ui.web.jobs.clips import Made, Studio
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_stream import cancel, owner_of, stream


class GenerateTab:
    """Built inside a gr.Tab. `clip`: a gr.State with the path of the visitor's last clip, as text."""

    def __init__(self, controls: Controls, job_queue: JobQueue, studio: Studio, clip: gr.State) -> None:
        self.controls, self.job_queue, self.studio = controls, job_queue, studio
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
        status = gr.HTML(elem_id="status")
        preview = gr.HTML(elem_id="preview")
        result = gr.HTML(elem_id="result")
        with gr.Accordion("Summary: what the attention calls did", open=False, elem_id="summary-box"):
            summary = gr.Code(language=None, label="Summary", interactive=False, elem_id="summary")
        with gr.Accordion("The same clip again: settings, command, program", open=False, elem_id="again-box"):
            settings = gr.Code(language="json", label="Settings", interactive=False, elem_id="settings")
            command = gr.Code(language="shell", label="Command", interactive=False, elem_id="command")
            program = gr.Code(language="python", label="Python", interactive=False, elem_id="program")
        outputs = [status, preview, result, summary, settings, command, program, clip]
        # Jobs wait in the job queue, which knows who waits for what; here nothing holds them up.
        go.click(
            self.run, controls.inputs, outputs, concurrency_limit=None, show_progress="hidden", api_visibility="private"
        )
        stop.click(self.cancel, None, [status], queue=False, show_progress="hidden", api_visibility="private")

    def run(self, request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        nothing = [gr.skip()] * 6
        try:
            controls = self.controls
            settings = settings_of(controls.models, controls.limits, controls.values(given))
            work = functools.partial(self.studio.clip, settings)
            yield ["", "", "", "", "", "", "", gr.skip()]  # what is shown must not be taken for what comes
            for status, preview, made in stream(self.job_queue, owner_of(request), work):
                if made is None:
                    yield [status, preview, *nothing]
                else:
                    yield ["", "", *self.shown(made), str(made.path)]
        except Exception as error:
            log_unexpected(error)
            yield [error_html(error), gr.skip(), *nothing]

    def cancel(self, request: gr.Request) -> Any:
        return cancel(self.job_queue, request)

    def shown(self, made: Made) -> list[Any]:
        """Result, summary, settings, command, program."""
        models = self.controls.models
        native = models.defaults(made.settings.model)
        command = command_line(made.settings, native, models.dtype, made.path)
        program = python_program(models.skeleton(made.settings.model), made.settings, models.dtype)
        summary = made.summary or "dense: the stock pipeline, not patched, so that nothing was counted"
        return [result_html(made), summary, json.dumps(made.settings.to_dict(), indent=2), command, program]


def result_html(made: Made) -> str:
    """The clip with what is worth knowing about it."""
    run = made.metadata["run"]
    seconds = run["seconds"]
    settings = made.settings
    version = run["frames_sha256"][:12]
    size = f"{settings.frames} frames of {settings.height}×{settings.width}, {settings.fps:g} a second"
    rows = [
        ("clip", escape(f"{size}, seed {settings.seed}")),
        ("method", escape(method_words(settings.method))),
        ("seconds", escape(", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value))),
        ("density where sparse", media.bar(run["density"], f"{run['density']:.3f}")),
        ("fallbacks to dense", escape("; ".join(f"{n} calls: {why}" for why, n in run["fallbacks"].items()) or "none")),
    ]
    if run.get("peak_memory", {}).get("bytes"):
        rows.append(("peak memory", escape(f"{media.size(run['peak_memory']['bytes'])} ({run['peak_memory']['of']})")))
    if run["content"]:
        rows.append(("prompt shown", escape(content_words(run["content"], settings.prompt))))
    notes = "".join(f"<p>{escape(note)}</p>" for note in run["notes"])
    player = media.video(made.path, f"the clip: {settings.prompt}", version=version)
    return f'<div class="tw-result">{player}<div>{media.table(rows)}{notes}{media.download(made.path)}</div></div>'
