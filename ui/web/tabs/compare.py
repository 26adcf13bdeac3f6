"""The comparison tab: dense and a method at the same seed, played in sync, with speed-up, PSNR and SSIM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from tilewise.pipelines.generation.compare import speedup_words
from tilewise.ui.common.tables import method_words
from tilewise.ui.web.common import media
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_from, settings_of
from tilewise.ui.web.jobs.clips import Made, Studio
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_view import JobView

KIND = "compare"
ABOUT = """Generates the clip of the settings with its method and with dense attention, from the same noise. Both are warmed up
first, so the timing is fair. PSNR and SSIM measure how close the two clips are, not which one is better."""


class CompareTab:
    """Built inside a gr.Tab. `clip`: the gr.State of the visitor's last clip."""

    def __init__(self, controls: Controls, job_queue: JobQueue, studio: Studio, clip: gr.State, job: Any) -> None:
        self.controls, self.studio = controls, studio
        gr.Markdown(ABOUT)
        with gr.Row(elem_classes=["tw-buttons"]):
            go = gr.Button("Compare with dense", variant="primary", elem_id="compare")
            stop = gr.Button("Cancel", elem_id="compare-cancel", interactive=False)
        status = gr.HTML(elem_id="compare-status")
        preview = gr.HTML()
        result = gr.HTML(elem_id="compare-result")
        with gr.Accordion("Numbers as JSON", open=False):
            numbers = gr.Code(language="json", label="Numbers", interactive=False, elem_id="compare-numbers")
        job_queue.register(KIND, self.work)
        self.view = JobView(job_queue, KIND, job, self.start, self.result, ["", None, gr.skip()])
        self.view.wire(go, stop, controls.inputs, status, preview, [result, numbers, clip])

    def start(self, *given: Any) -> tuple[str, dict[str, Any]]:
        controls = self.controls
        settings = settings_of(controls.models, controls.limits, controls.values(given))
        controls.limits.check(settings, clips=2)
        check_fits(controls.models, settings)
        return settings.prompt[:200], {"settings": settings.to_dict()}

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        settings = settings_from(values["settings"], self.controls.models, self.controls.limits)
        self.controls.limits.check(settings, clips=2)
        check_fits(self.controls.models, settings)
        sparse, dense, numbers = self.studio.pair(settings, job)
        return {"clip": self.studio.name(sparse), "dense": self.studio.name(dense), "numbers": numbers}

    def result(self, job: Job) -> list[Any]:
        """Result, numbers, clip."""
        if job.status != DONE:
            return self.view.nothing
        sparse, dense = (self.studio.find(job.result[name]) for name in ("clip", "dense"))
        numbers = job.result["numbers"]
        return [pair_html(sparse, dense, numbers), json.dumps(numbers, indent=2), str(sparse.path)]


def pair_html(sparse: Made, dense: Made, found: Mapping[str, Any]) -> str:
    """Two players that page.js keeps in step, and a table. found: as `Comparison.to_dict` gives it."""
    same = "identical" if found["psnr"] is None else f"{found['psnr']:.1f} dB"
    rows = [
        ("speed-up, denoising", f"<b>{escape(_speedup(found, 'denoise'))}</b>"),
        ("speed-up, in all", escape(_speedup(found, "total"))),
        ("PSNR", escape(same)),
        ("SSIM", "–" if found["ssim"] is None else f"{found['ssim']:.3f}"),
        ("seconds, dense", _seconds(dense)),
        ("seconds, method", _seconds(sparse)),
        *media.run_share_rows(sparse.run),
    ]
    figures = [_figure(dense, "dense"), _figure(sparse, method_words(sparse.settings.method))]
    return f"{media.pair(figures)}{media.table(rows)}"


def _speedup(found: Mapping[str, Any], phase: str) -> str:
    return speedup_words([run[phase] for run in found.get("runs") or [found["speedup"]]])


def _figure(made: Made, words: str) -> str:
    label = f"{words}: {made.settings.prompt}"
    return media.figure(made.path, label, escape(words), version=made.run["frames_sha256"][:12])


def _seconds(made: Made) -> str:
    seconds = made.run["seconds"]
    return escape(f"{seconds['total']:.2f} ({seconds['denoise']:.2f} denoising)")
