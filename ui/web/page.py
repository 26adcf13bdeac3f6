"""The page: controls and plan on the left, tabs on the right."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms.controls import Controls, method_help
from tilewise.ui.web.jobs.clips import Studio
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.tabs.attention import AttentionTab
from tilewise.ui.web.tabs.batch import BatchTab
from tilewise.ui.web.tabs.compare import CompareTab
from tilewise.ui.web.tabs.generate import GenerateTab
from tilewise.ui.web.tabs.highres import HighresTab
from tilewise.ui.web.tabs.history import HistoryTab

TITLE = "tilewise"
SWEPT = (600, 3600)  # every so many seconds, uploads and drawn pictures older than so many seconds go
FONTS = (
    "system-ui",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)  # the visitor's own: none is fetched
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container{max-width:1500px!important}
.tw-head h1{margin:0;font-size:1.35rem}.tw-head p{margin:.1rem 0 .4rem;opacity:.8}
.tw-status{padding:.35rem 0}
.tw-status progress{display:block;width:100%;height:.7rem;margin-top:.35rem;accent-color:var(--color-accent)}
.tw-error{border-left:4px solid #d33;padding:.5rem .8rem;background:color-mix(in srgb,#d33 12%,transparent);white-space:pre-wrap}
.tw-preview{image-rendering:pixelated;border-radius:6px;max-width:100%}
.tw-clip{width:100%;max-width:640px;min-width:220px;border-radius:6px;background:#000}
.tw-result{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}.tw-result>video{flex:1 1 280px;height:auto}
.tw-result>div{flex:1 1 280px}
.tw-pair{display:flex;flex-wrap:wrap;gap:.8rem}.tw-pair figure{flex:1 1 220px;margin:0}.tw-pair-buttons{flex:1 1 100%;margin:0}
.tw-clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:.8rem}.tw-clips figure{margin:0}
.tw-clips video{min-width:0}figcaption{font-size:.87rem;overflow-wrap:anywhere}
.tw-play{border:1px solid var(--border-color-primary);border-radius:6px;padding:.35rem .9rem;
background:var(--button-secondary-background-fill);color:var(--button-secondary-text-color)}
.tw-play:focus-visible,.tw-download:focus-visible,.tw-clip:focus-visible{outline:3px solid var(--color-accent);outline-offset:2px}
.tw-table{border-collapse:collapse;width:100%;font-size:.9rem}.tw-table th{text-align:left;font-weight:600;white-space:nowrap}
.tw-table th,.tw-table td{padding:.22rem .6rem .22rem 0;border-bottom:1px solid var(--border-color-primary);vertical-align:top}
.tw-table td{overflow-wrap:anywhere;width:100%}
.prose .tw-table,.prose .tw-table *{border-left:0!important;border-right:0!important;border-top:0!important}
.tw-bar{display:inline-block;width:7rem;height:.6rem;border-radius:.3rem;vertical-align:middle;overflow:hidden;
background:color-mix(in srgb,var(--body-text-color) 18%,transparent)}
.tw-bar>span{display:block;height:100%;background:var(--color-accent)}
.tw-download{display:inline-block;margin-top:.5rem;text-decoration:underline}
#attention img{cursor:crosshair}#attention-strip img{cursor:pointer}
"""

# Two players of a pair start, stop and seek together, and the second follows the first: separate decoders drift apart.
SCRIPT = """
<script>
(() => {
  const pairOf = (node) => node.closest && node.closest('.tw-pair');
  const others = (video) => [...pairOf(video).querySelectorAll('video')].filter((v) => v !== video);
  const follow = (kind, act) => document.addEventListener(kind, (event) => {
    const video = event.target;
    if (video.tagName === 'VIDEO' && pairOf(video)) for (const other of others(video)) act(video, other);
  }, true);
  const start = (video) => video.play().catch(() => {});  // it may be paused or taken away before it plays: no error
  const align = (from, to) => { if (Math.abs(from.currentTime - to.currentTime) > 0.05) to.currentTime = from.currentTime; };
  follow('play', (from, to) => { if (to.paused) { align(from, to); start(to); } });
  follow('pause', (from, to) => { if (!to.paused) to.pause(); align(from, to); });
  follow('seeked', (from, to) => { if (from.paused) align(from, to); });
  follow('timeupdate', (from, to) => {
    if (from === pairOf(from).querySelector('video') && Math.abs(from.currentTime - to.currentTime) > 0.12) align(from, to);
  });
  document.addEventListener('click', (event) => {
    const button = event.target.closest && event.target.closest('.tw-play');
    if (!button) return;
    const first = pairOf(button).querySelector('video');
    if (first.paused) start(first); else first.pause();
  });
})();
</script>
"""


def theme() -> gr.themes.Base:
    """Light and dark, as the visitor's system has it; no font is fetched."""
    return gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)


def build_page(models: Models, limits: Limits, job_queue: JobQueue, outputs: Path) -> gr.Blocks:
    """The whole page. outputs: absolute; where clips and manifests go."""
    studio = Studio(models, outputs)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=SWEPT) as page:
        gr.HTML(
            "<h1>tilewise</h1><p>Sparse attention for diffusers pipelines: see what is skipped, and what it costs.</p>",
            elem_classes=["tw-head"],
        )
        clip = gr.State("")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                controls = Controls(models, limits)
                with gr.Accordion("What the methods are", open=False):
                    gr.Markdown(method_help())
            with gr.Column(scale=3, min_width=380), gr.Tabs():
                with gr.Tab("Generate"):
                    GenerateTab(controls, job_queue, studio, clip)
                with gr.Tab("Compare"):
                    CompareTab(controls, job_queue, studio, clip)
                with gr.Tab("See the attention") as tab:
                    AttentionTab(controls, job_queue, studio, clip, tab)
                with gr.Tab("High resolution") as tab:
                    highres = HighresTab(controls, job_queue, models, outputs, tab)
                with gr.Tab("Batch"):
                    BatchTab(controls, job_queue, outputs)
                with gr.Tab("History") as tab:
                    HistoryTab(controls, highres, outputs, tab)
        controls.wire(page)

        def gone(request: gr.Request) -> None:
            """A tab was closed: nobody waits for its work any more."""
            job_queue.cancel(str(request.session_hash))

        page.unload(gone)
    return page
