"""The history tab: clips from the manifests in the output folder. Their settings can be loaded into the controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.batch.manifest import NAME, Line, ManifestError, clip_path, read_manifest
from tilewise.pipelines.batch.manifest_comparison import method_name
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import FIELDS, json_object, settings_from, values_of
from tilewise.ui.web.forms.highres_form import own_values, stages_in
from tilewise.ui.web.tabs.highres import HighresTab
from tilewise.ui.web.tabs.highres_result import stages_html
from tilewise.ui.web.tabs.job_stream import status_html

MOST = 60  # clips that the list shows, the latest first


@dataclasses.dataclass(frozen=True)
class Past:
    """One clip of a manifest."""

    name: str  # folder and key: what the page calls it by
    path: Path
    line: Line

    @property
    def label(self) -> str:
        started = str(self.line["run"].get("started", ""))[:16].replace("T", " ")
        prompt = str(self.line["prompt"])
        words = prompt if len(prompt) <= 60 else prompt[:59] + "…"
        size = f"{self.line['frames']}×{self.line['height']}×{self.line['width']}"
        stages = self.line["run"].get("highres")
        if stages is None:
            method = self.line["method"]["method"]["name"]
        else:
            method = f"two stages, from {stages['native']['height']}×{stages['native']['width']}"
        return f"{started} · {words} · {method} · {size} · seed {self.line['seed']}"

    @property
    def html(self) -> str:
        """The clip with what is worth knowing about it."""
        run = self.line["run"]
        if run.get("highres") is not None:
            return stages_html(self.path, self.line)
        rows = [
            ("prompt", escape(str(self.line["prompt"])[:500])),
            ("method", escape(method_name(self.line))),
            ("density", media.bar(run["density"], f"{run['density']:.3f}")),
            ("seconds", f"{run['seconds']['total']:.2f}"),
            ("device", escape(f"{run['device_name']}, {run['dtype']}")),
        ]
        player = media.video(self.path, str(self.line["prompt"]), version=str(self.line["sha256"])[:12])
        return f'<div class="tw-result">{player}<div>{media.table(rows)}{media.download(self.path)}</div></div>'


def past_clips(outputs: Path, most: int = MOST) -> tuple[list[Past], list[str]]:
    """The latest clips whose files are there, and what could not be read."""
    folders = [outputs, *sorted(path for path in outputs.iterdir() if path.is_dir())] if outputs.is_dir() else []
    found, problems = [], []
    for folder in folders:
        try:
            lines = read_manifest(folder)
        except ManifestError as error:
            problems.append(str(error))
            continue
        for key, line in lines.items():
            path = clip_path(folder, line)
            if line["status"] != "done" or path is None:
                continue
            try:
                if path.is_file():
                    past = Past(f"{folder.name}/{key}", path, line)
                    _ = past.label, past.html
                    found.append(past)
            except Exception as error:  # whatever is odd about a line, it hides no other clip
                problems.append(f"{folder / NAME}: the line of {path.name:.80} cannot be shown ({error!r:.80})")
    found.sort(key=lambda past: str(past.line["run"].get("started", "")), reverse=True)
    return found[:most], problems


class HistoryTab:
    """Built inside a gr.Tab, which brings the list up to date when it is opened."""

    def __init__(self, controls: Controls, highres: HighresTab, outputs: Path, tab: gr.Tab) -> None:
        self.controls, self.outputs = controls, outputs
        self.count = len(controls.inputs) + len(highres.own)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                clips = gr.Radio([], label="Clips made on this machine, latest first", elem_id="history")
                fresh = gr.Button("Refresh", elem_id="history-fresh")
            with gr.Column(scale=2, min_width=260):
                shown = gr.HTML(elem_id="history-clip")
                again = gr.Button("Use these settings again", variant="primary", elem_id="use-again")
        with gr.Accordion("Or settings as JSON", open=False):
            text = gr.Textbox(label="Settings, as the page shows them under a clip", lines=6, elem_id="paste-settings")
            paste = gr.Button("Use these settings", elem_id="use-pasted")
        words = gr.HTML(elem_id="history-words")
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([tab.select, fresh.click], self.look, None, [clips, words], **quiet)
        clips.change(self.show, [clips], [shown], **quiet)
        set_ = [words, *controls.inputs, *highres.own]
        again.click(self.use, [clips], set_, **quiet)
        paste.click(self.use_pasted, [text], set_, **quiet)

    def look(self) -> list[Any]:
        found, problems = past_clips(self.outputs)
        told = problems or ([] if found else ["there are no clips yet"])
        return [
            gr.update(choices=[(past.label, past.name) for past in found]),
            "".join(f"<p>{escape(t)}</p>" for t in told),
        ]

    def show(self, name: str | None) -> str:
        try:
            return self._find(name).html
        except ConfigError:
            return ""

    def use(self, name: str | None) -> list[Any]:
        try:
            return self._filled(self._find(name).line)
        except Exception as error:
            log_unexpected(error)
            return [error_html(error), *[gr.skip()] * self.count]

    def use_pasted(self, text: str) -> list[Any]:
        try:
            return self._filled(json_object(text or ""))
        except Exception as error:
            log_unexpected(error)
            return [error_html(error), *[gr.skip()] * self.count]

    def _filled(self, told: Mapping[str, Any]) -> list[Any]:
        """Of a clip of two stages the controls get the native stage, and High resolution's own the rest."""
        models, found = self.controls.models, stages_in(told)
        if found is None:
            settings, own, words = settings_from(told, models), None, "the controls are set"
        else:
            target, stages = settings_from(found[0], models), found[1]
            own = own_values(target, stages, models.skeleton(target.model))
            words = "the controls are set, and those of High resolution, which makes such a clip"
            settings = dataclasses.replace(target, height=stages.height, width=stages.width, method=stages.method)
        values = values_of(settings)
        shared = [values[name] for name in FIELDS]
        return [status_html(words), *shared, *(own or [gr.skip()] * (self.count - len(shared)))]

    def _find(self, name: str | None) -> Past:
        for past in past_clips(self.outputs)[0]:
            if past.name == name:
                return past
        raise ConfigError("choose a clip of the list first")
