"""The page: prompt, settings and plan on the left, tabs on the right. On a phone the tabs come right after the prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.conditioning.files import ROLES
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.web.common.actions import action_html
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.common.uploads import FOLDER
from tilewise.ui.web.forms.controls import Controls, method_help, prompt_box
from tilewise.ui.web.forms.highres_form import FIELDS as HIGHRES_FIELDS
from tilewise.ui.web.forms.url_state import UrlState
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.live.hub import LiveHub
from tilewise.ui.web.tabs.attention import AttentionTab
from tilewise.ui.web.tabs.batch import BatchTab
from tilewise.ui.web.tabs.compare import CompareTab
from tilewise.ui.web.tabs.generate import GenerateTab
from tilewise.ui.web.tabs.highres import HighresTab
from tilewise.ui.web.tabs.history import DROPPED, HistoryTab
from tilewise.ui.web.tabs.job_view import job_box
from tilewise.ui.web.tabs.jobs import NAMES, POLL, JobsTab, line_html
from tilewise.ui.web.tabs.live import LiveTab

TITLE = "tilewise"
SWEPT = (600, 3600)  # every so many seconds, uploads and drawn pictures older than so many seconds go
LOOK = Path(__file__).parent / "look"
TABS = {
    "generate": "Generate",
    "live": "Live",
    "compare": "Compare",
    "attention": "See the attention",
    "highres": "High resolution",
    "batch": "Batch",
    "history": "History",
    "jobs": "Jobs",
}
FONTS = (
    "system-ui",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)  # the visitor's own: none is fetched
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# A value that arrives before its component is there would be lost, or shown and nothing would follow it. The browser fetches the
# code of each kind of component by itself, so there is one here of each.
WHEN_READY = """async () => {
  const all = ['job-batch', 'prompt', 'method', 'measure', 'density', 'guidance', 'tabs'];
  const ready = () => window.tilewise && all.every((id) => document.querySelector(`#${id} :is(input, textarea, [role=tab])`));
  for (let n = 0; n < 600 && !ready(); n++) await new Promise((done) => setTimeout(done, 50));
  return [];
}"""
HEAD = "<h1>tilewise</h1><p>Sparse attention for diffusers pipelines: see what is skipped, and what it costs.</p>"


def look(name: str) -> str:
    """The style sheet or the script."""
    return (LOOK / name).read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Light and dark, as the visitor's system has it; no font is fetched. style.css sets the colours."""
    return gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=FONTS, font_mono=MONO)


class Page:
    """The whole page, as `blocks`. head: HTML for the document's head. outputs: absolute; where clips and manifests go.

    Building it registers the kinds of jobs with the queue.
    """

    def __init__(self, models: Models, limits: Limits, job_queue: JobQueue, outputs: Path) -> None:
        self.models, self.job_queue = models, job_queue
        studio = Studio(models, outputs)
        limits = dataclasses.replace(limits, inputs=outputs / FOLDER)
        self.live = LiveHub(models, limits, job_queue, outputs)
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=SWEPT, fill_width=True) as self.blocks:
            with gr.Row(elem_id="head"):
                gr.HTML(HEAD, elem_classes=["tw-head"])
                line = action_html(elem_id="queue-line")
            timer = gr.Timer(POLL)
            self.boxes = {kind: job_box(kind) for kind in NAMES}
            clip = gr.State("")
            with gr.Row(elem_id="main"):
                with gr.Column(elem_id="ask", min_width=280):
                    prompt = prompt_box()
                    with gr.Row(elem_classes=["tw-buttons"]):
                        go = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Cancel", elem_id="cancel", interactive=False)
                with gr.Column(elem_id="settings-column", min_width=280):
                    self.controls = controls = Controls(models, limits, prompt)
                    with gr.Accordion("What the methods are", open=False):
                        gr.Markdown(method_help())
                    load = gr.UploadButton(
                        "Load settings from a clip …", file_types=[f".{kind}" for kind in DROPPED], size="sm",
                        elem_id="load-settings", type="filepath",
                    )  # fmt: skip
                    told = gr.HTML(elem_id="load-words")
                with (
                    gr.Column(elem_id="show", min_width=280),
                    gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as self.tabs,
                ):
                    tab, boxes = self._tab, self.boxes
                    with tab("generate"):
                        generate = GenerateTab(controls, job_queue, studio, clip, boxes["generate"], go, stop)
                    with tab("live"):
                        live = LiveTab(controls, job_queue, self.live, boxes["live"])
                    with tab("compare"):
                        CompareTab(controls, job_queue, studio, clip, boxes["compare"])
                    with tab("attention") as this:
                        AttentionTab(controls, job_queue, studio, clip, this, boxes["watch"])
                    with tab("highres") as this:
                        highres = HighresTab(controls, job_queue, models, outputs, this, boxes["highres"])
                    with tab("batch"):
                        batch = BatchTab(controls, job_queue, outputs, boxes["batch"])
                    with tab("history") as this:
                        HistoryTab(controls, highres, outputs, this, load, told)
                    with tab("jobs"):
                        JobsTab(job_queue, line, timer, self.boxes, self.tabs)
            go.click(lambda: gr.Tabs(selected="generate"), None, [self.tabs], queue=False, api_visibility="private")
            own = {f"highres-{name}": each for name, each in zip(HIGHRES_FIELDS, highres.own, strict=True)}
            said = {
                name: each for name, each in controls.components.items() if name not in ROLES
            }  # no file is in an address
            self.address = UrlState({**said, **own, **batch.own, **live.own})
            self.address.wire(go.click)
            shown = [*self.address.fields.values(), *self.boxes.values(), line]
            opened = self.blocks.load(
                self.opened, None, shown, queue=False, show_progress="hidden", api_visibility="private", js=WHEN_READY
            )
            opened.then(None, None, None, js="() => tilewise.addressIsRead()")
            generate.examples.wire(opened)
            controls.wire(opened)
        self.head = f"{self.address.script()}<script>{look('page.js')}</script><script>{look('live.js')}</script>"

    def _tab(self, name: str) -> gr.Tab:
        tab = gr.Tab(TABS[name], id=name)
        tab.select(None, None, None, js=f"() => tilewise.tab('{name}')")
        return tab

    def opened(self, request: gr.Request) -> list[Any]:
        """What the address says: the controls, and the jobs that the tabs go on showing. page.js opens the tab."""
        query = {str(name): str(value) for name, value in dict(request.query_params).items()}
        values = self.address.read(query, self._usual(query))
        names = [query.get(f"job-{kind}", "")[:20] for kind in self.boxes]
        return [*values, *names, line_html(self.job_queue)]

    def _usual(self, query: dict[str, str]) -> dict[str, Any]:
        """Another model than the first has its own size and steps, where the address does not say them."""
        model = query.get("model")
        if model is None or model == self.models.names[0]:
            return {}
        try:
            return self.controls.model_values(model)
        except TilewiseError:
            return {}
