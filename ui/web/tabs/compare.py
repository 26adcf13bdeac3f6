"""The comparison tab: dense and a method at the same seed, played in sync, with speed-up, PSNR and SSIM."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from tilewise.ui.common.tables import method_words
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_of
from tilewise.ui.web.jobs.clips import Made, Pair, Studio
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_stream import cancel, owner_of, stream

ABOUT = """Generates the clip of the settings on the left with its method and with dense attention, from the same noise. Both are
warmed up first, so the timing is fair. PSNR and SSIM measure how close the two clips are, not which one is better."""


class CompareTab:
    """Built inside a gr.Tab. `clip`: the gr.State of the visitor's last clip."""

    def __init__(self, controls: Controls, job_queue: JobQueue, studio: Studio, clip: gr.State) -> None:
        self.controls, self.job_queue, self.studio = controls, job_queue, studio
        gr.Markdown(ABOUT)
        with gr.Row():
            go = gr.Button("Compare with dense", variant="primary", elem_id="compare")
            stop = gr.Button("Cancel", variant="stop", elem_id="compare-cancel")
        status = gr.HTML(elem_id="compare-status")
        result = gr.HTML(elem_id="compare-result")
        with gr.Accordion("Numbers as JSON", open=False):
            numbers = gr.Code(language="json", label="Numbers", interactive=False, elem_id="compare-numbers")
        outputs = [status, result, numbers, clip]
        go.click(
            self.run, controls.inputs, outputs, concurrency_limit=None, show_progress="hidden", api_visibility="private"
        )
        stop.click(self.cancel, None, [status], queue=False, show_progress="hidden", api_visibility="private")

    def run(self, request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        nothing = [gr.skip()] * 3
        try:
            controls = self.controls
            settings = settings_of(controls.models, controls.limits, controls.values(given))
            controls.limits.check(settings, clips=2)
            yield ["", "", "", gr.skip()]  # what is shown must not be taken for what comes
            for status, _, pair in stream(
                self.job_queue, owner_of(request), functools.partial(self.studio.pair, settings)
            ):
                if pair is None:
                    yield [status, *nothing]
                else:
                    numbers = json.dumps(pair.comparison.to_dict(), indent=2)
                    yield ["", pair_html(pair), numbers, str(pair.sparse.path)]
        except Exception as error:
            log_unexpected(error)
            yield [error_html(error), *nothing]

    def cancel(self, request: gr.Request) -> Any:
        return cancel(self.job_queue, request)


def pair_html(pair: Pair) -> str:
    """Two players that page.js keeps in step, and a table."""
    found = pair.comparison
    same = "identical" if math.isinf(found.psnr) else f"{found.psnr:.1f} dB"
    rows = [
        ("speed-up, denoising", f"<b>{escape(found.speedup_words('denoise'))}</b>"),
        ("speed-up, in all", escape(found.speedup_words("total"))),
        ("PSNR", escape(same)),
        ("SSIM", "–" if found.ssim is None else f"{found.ssim:.3f}"),
        ("seconds, dense", _seconds(pair.dense)),
        ("seconds, method", _seconds(pair.sparse)),
        ("density where sparse", media.bar(pair.sparse.metadata["run"]["density"], f"{_density(pair.sparse):.3f}")),
    ]
    return (
        '<div class="tw-pair" data-sync>'
        f"{_figure(pair.dense, 'dense')}{_figure(pair.sparse, method_words(pair.sparse.settings.method))}"
        '<p class="tw-pair-buttons"><button type="button" class="tw-play">Play or pause both</button></p></div>'
        f"{media.table(rows)}"
    )


def _figure(made: Made, words: str) -> str:
    version = made.metadata["run"]["frames_sha256"][:12]
    player = media.video(made.path, f"{words}: {made.settings.prompt}", version=version, autoplay=False)
    return (
        f"<figure>{player}<figcaption>{escape(words)}<br>{media.download(made.path, 'Download')}</figcaption></figure>"
    )


def _seconds(made: Made) -> str:
    seconds = made.metadata["run"]["seconds"]
    return escape(f"{seconds['total']:.2f} ({seconds['denoise']:.2f} denoising)")


def _density(made: Made) -> float:
    return float(made.metadata["run"]["density"])
