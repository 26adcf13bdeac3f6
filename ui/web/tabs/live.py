"""The live tab: a stream that plays while it is made, and whose prompt can be changed on the way. live.js plays it."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from tilewise.pipelines.streaming.preparation import find_causal
from tilewise.pipelines.streaming.settings import CHANGES, WAYS, StreamSettings
from tilewise.plugins.config import resolve
from tilewise.plugins.text_format import counted
from tilewise.ui.web.common import media
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import config_of, said_of
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.live.hub import KIND, LiveHub
from tilewise.ui.web.live.requests import SHARED, USUAL_SECONDS, asked
from tilewise.ui.web.tabs.job_view import JobView

OWN = "the model's own"
ABOUT = """Plays a video while it is made, chunk by chunk, about a second behind. It has the prompt, size, seed and model of the
settings; write another prompt at any time and press “Change the prompt”. Whoever closes the page ends the stream. Programs get
the same video from `/live.mp4?prompt=…`."""
PLAYER = '<div id="live-player" class="tw-live"></div>'  # live.js fills it


class LiveTab:
    """Built inside a gr.Tab. own: its controls by the names that the address calls them."""

    def __init__(self, controls: Controls, job_queue: JobQueue, hub: LiveHub, job: Any) -> None:
        self.controls, self.hub = controls, hub
        gr.Markdown(ABOUT)
        with gr.Row():
            seconds = gr.Number(USUAL_SECONDS, label="Length, seconds", elem_id="live-seconds", min_width=110)
            way = gr.Dropdown([OWN, *WAYS], value=OWN, label="How it goes on", elem_id="live-way", min_width=130)
            change = gr.Dropdown(
                list(CHANGES), value=CHANGES[0], label="A new prompt comes by", elem_id="live-change", min_width=130
            )
        sparse = gr.Checkbox(
            False, label="The attention method of the settings, inside the window (off: dense)", elem_id="live-sparse"
        )
        self.own = {"live-seconds": seconds, "live-way": way, "live-change": change, "live-sparse": sparse}
        with gr.Row(elem_classes=["tw-buttons"]):
            go = gr.Button("Start", variant="primary", elem_id="live-start")
            stop = gr.Button("Stop", elem_id="live-stop", interactive=False)
        status = gr.HTML(elem_id="live-status")
        gr.HTML(PLAYER)
        preview, result = gr.HTML(), gr.HTML(elem_id="live-result")
        self.view = JobView(job_queue, KIND, job, self.start, self.result, [""], "stopped before its first frames")
        # Before the tab follows its job: Gradio runs what comes after that when the job has ended.
        job.change(None, [job], None, js="(id) => tilewise.live.show(id)")
        self.view.wire(go, stop, [*self.own.values(), *controls.inputs], status, preview, [result])

    def start(self, seconds: Any, way: Any, change: Any, sparse: Any, *given: Any) -> tuple[str, dict[str, Any]]:
        return self.hub.checked(self.asked(seconds, way, change, sparse, self.controls.values(given)))

    def asked(self, seconds: Any, way: Any, change: Any, sparse: Any, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a job from the controls. Raises ConfigError."""
        said = said_of(values, ["prompt", "model", "steps", "guidance", "image", *SHARED])
        native = self.hub.models.defaults(said["model"])
        named = way not in (None, "", OWN)
        windows = named or find_causal(said["model"], StreamSettings()) is None
        stream = {"seconds": seconds, "prompt_change": str(change), **({"way": str(way)} if named else {})}
        return asked(
            prompt=said["prompt"],
            model=said["model"],
            method=config_of(values) if sparse else resolve("dense"),
            # Distilled weights have their own guidance and steps, which the controls know nothing of.
            guidance=said["guidance"] if windows or said["guidance"] != native.guidance else None,
            shared={name: said[name] for name in ("image", *SHARED) if said[name] not in (None, "")},
            stream={**stream, "steps": said["steps"]} if windows else stream,
        )

    def result(self, job: Job) -> list[Any]:
        if job.status != DONE:
            return [""]
        made = job.result
        words = f"{counted(made['frames'], 'frame')}, {made['seconds']:.1f} s, made at {made['fps']:.1f} a second"
        rows = [("the stream", escape(words))]
        if made.get("note"):
            rows.append(("note", escape(made["note"])))
        return [media.table(rows)]
