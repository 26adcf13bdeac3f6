"""The history tab: clips from the manifests in the output folder. Their settings can be loaded into the controls, and so can
those of a clip that is dropped onto the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.media.video import read_settings
from tilewise.plugins.errors import ConfigError
from tilewise.ui.web.common.actions import action_html, chosen
from tilewise.ui.web.common.messages import error_html, error_message, log_unexpected
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import FIELDS, json_object, settings_from, values_of
from tilewise.ui.web.forms.highres_form import own_values, stages_in
from tilewise.ui.web.tabs.highres import HighresTab
from tilewise.ui.web.tabs.job_view import status_html
from tilewise.ui.web.tabs.past_clips import Past, gallery_html, past_clips

DROPPED = ("mp4", "png", "json")  # what settings can be read from


class HistoryTab:
    """Built inside a gr.Tab, which brings the list up to date when it is opened.

    load: a gr.UploadButton elsewhere on the page, whose file's settings are loaded, and told: a gr.HTML beside it.
    """

    def __init__(
        self, controls: Controls, highres: HighresTab, outputs: Path, tab: gr.Tab, load: Any, told: Any
    ) -> None:
        self.controls, self.outputs = controls, outputs
        self.count = len(controls.inputs) + len(highres.own)
        with gr.Row(elem_classes=["tw-buttons"]):
            again = gr.Button("Use these settings again", variant="primary", elem_id="use-again")
            fresh = gr.Button("Refresh", elem_id="history-fresh")
        words = gr.HTML(elem_id="history-words")
        shown = gr.HTML(elem_id="history-clip")
        gr.HTML(
            '<p class="tw-quiet">Latest first. <mark>Marked</mark> is what differs from the clip made before it.</p>'
        )
        clips = action_html(elem_id="history")
        self._cache = Path(clips.GRADIO_CACHE)
        picked = gr.State("")
        with gr.Accordion("Or settings as JSON", open=False):
            text = gr.Textbox(label="Settings, as the page shows them under a clip", lines=6, elem_id="paste-settings")
            paste = gr.Button("Use these settings", elem_id="use-pasted")
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([tab.select, fresh.click], self.look, [picked], [clips, words], **quiet)
        clips.click(self.show, None, [shown, picked], **quiet)
        set_ = [*controls.inputs, *highres.own]
        again.click(self.use, [picked], [words, *set_], **quiet)
        paste.click(self.use_pasted, [text], [words, *set_], **quiet)
        load.upload(self.use_file, [load], [told, *set_], **quiet)

    def look(self, picked: str) -> list[Any]:
        found, problems = past_clips(self.outputs)
        told = problems or ([] if found else ["there are no clips yet"])
        words = "".join(f"<p>{escape(t)}</p>" for t in told)
        return [gallery_html(found, self._cache, picked), words]

    def show(self, event: gr.EventData) -> list[Any]:
        name = chosen(event)[1]
        try:
            return [self._find(name).html, name]
        except ConfigError as error:
            return [error_html(error), ""]

    def use(self, name: str | None) -> list[Any]:
        return self._filled(lambda: self._find(name).line)

    def use_pasted(self, text: str) -> list[Any]:
        return self._filled(lambda: json_object(text or ""))

    def use_file(self, file: str | None) -> list[Any]:
        """Of a clip that was dropped onto the page, or of the JSON beside one."""
        return self._filled(lambda: settings_in_file(file), toast=True)

    def _filled(self, read: Any, toast: bool = False) -> list[Any]:
        """toast: say a refusal where it is seen wherever the page is scrolled to."""
        try:
            return self._values(read())
        except Exception as error:
            log_unexpected(error)
            if toast:
                gr.Warning(escape(error_message(error)), title="The settings were not loaded")
            return [error_html(error), *[gr.skip()] * self.count]

    def _values(self, told: Mapping[str, Any]) -> list[Any]:
        """Of a clip of two stages the controls get the native stage, and High resolution's own the rest."""
        models, limits, found = self.controls.models, self.controls.limits, stages_in(told)
        if found is None:
            settings, own, words = settings_from(told, models, limits), None, "the controls are set"
        else:
            target, stages = settings_from(found[0], models, limits), found[1]
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


def settings_in_file(file: str | None) -> Mapping[str, Any]:
    """The settings inside a clip, or in a JSON file. Raises ConfigError, OutputError for what is neither."""
    path = Path(str(file))
    if path.suffix.lower() == ".json":
        try:
            return json_object(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path.name} is not UTF-8 text") from error
    if path.suffix.lower().removeprefix(".") not in DROPPED:
        raise ConfigError(f"settings are read from clips (.mp4, .png) and .json files, not from {path.name[:80]}")
    found = read_settings(path)
    if found is None:
        raise ConfigError(f"{path.name[:80]} holds no settings of tilewise: only clips that it wrote do")
    return found
