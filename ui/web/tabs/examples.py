"""What an empty page shows: a clip that the bundled model made, dense and with a method, and a button that loads its settings."""

from __future__ import annotations

import base64
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_message, log_unexpected
from tilewise.ui.web.forms.controls import QUIET, Controls
from tilewise.ui.web.forms.form_parsing import FIELDS, name_of, values_of
from tilewise.ui.web.jobs.clips import Made

LOOK = Path(__file__).parents[1] / "look"
FILES = ("example-dense.mp4", "example-sparse.mp4")  # of one prompt and seed; their metadata says how they were made


class Examples:
    """Built inside a gr.Blocks, in place of a result. job: the field with the id of the job that the tab shows.

    Not there before `wire`'s event, nor once the tab shows a job.
    """

    def __init__(self, controls: Controls, job: Any) -> None:
        self.controls, self.job = controls, job
        with gr.Column(visible=False, elem_id="examples") as self.box:
            self.clips = gr.HTML(elem_id="example-clips")
            load = gr.Button("Load its settings", size="sm", elem_id="load-example")
        load.click(self.load, None, controls.inputs, **QUIET)
        job.change(lambda: gr.update(visible=False), None, [self.box], **QUIET)

    def wire(self, opened: Any) -> None:
        """Shown after the event `opened`, which has set the job by then."""
        opened.then(self.show, [self.job], [self.box, self.clips], **QUIET)

    def show(self, job: str) -> list[Any]:
        try:
            if not job and examples()[1].settings.model in self.controls.models.names:
                return [gr.update(visible=True), examples_html()]
        except Exception as error:  # the page is worth more than its examples
            log_unexpected(error)
        return [gr.update(visible=False), gr.skip()]

    def load(self) -> list[Any]:
        try:
            values = values_of(examples()[1].settings)
        except Exception as error:
            log_unexpected(error)
            gr.Warning(escape(error_message(error)), title="The settings were not loaded")
            return [gr.skip()] * len(FIELDS)
        return [values[name] for name in FIELDS]


@cache
def examples() -> tuple[Made, Made]:
    """The dense clip and the sparse one."""
    dense, sparse = (Made.read(LOOK / name) for name in FILES)
    return dense, sparse


@cache
def examples_html() -> str:
    """Both clips, inside the HTML: the server gives out no files but those of the outputs."""
    figures = [_figure(made) for made in examples()]
    prompt = escape(examples()[1].settings.prompt)
    return f"<p>An example: <b>{prompt}</b>, dense and sparse from the same seed.</p>{media.pair(figures)}"


def _figure(made: Made) -> str:
    source = "data:video/mp4;base64," + base64.b64encode(made.path.read_bytes()).decode()
    method = escape(name_of(made.settings.method), quote=True)
    label = f"example clip, {method}"
    return (
        f'<figure><video class="tw-clip" controls loop muted playsinline autoplay aria-label="{label}" src="{source}"></video>'
        f"<figcaption><b>{method}</b>: {escape(timing(made))}</figcaption></figure>"
    )


def timing(made: Made) -> str:
    """How long a clip took, on what, and how much of the attention it computed, by its metadata."""
    run = made.run
    device = "a CPU" if run["device"] == "cpu" else run["device_name"]
    share = "" if made.settings.is_dense else f"; {run['density']:.0%} of the token pairs where it is sparse"
    return "; ".join([f"{run['seconds']['total']:.0f} s on {device}, {run['dtype']}{share}", *run.get("notes", ())])
