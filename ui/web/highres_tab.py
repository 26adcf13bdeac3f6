"""A clip past the model's own size: the native clip as soon as it is there, then the one at the target beside it.

Both are written with their settings beside them, as `tilewise generate --highres` does. They are in no manifest: its key and its
readers know a clip by the settings of one stage.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.clip_content import analyse
from tilewise.pipelines.files import check_writable, suffix_of
from tilewise.pipelines.generate import Clip
from tilewise.pipelines.highres import HighresClip, Work, judged, make
from tilewise.pipelines.highres_settings import GUIDED, PATHS, HighresSettings
from tilewise.pipelines.job import slug
from tilewise.pipelines.loading import cast_skeleton, load_skeleton, resolve_dtype
from tilewise.pipelines.memory import PeakMemory
from tilewise.pipelines.record import clip_record, machine
from tilewise.pipelines.settings import prompt_notes
from tilewise.pipelines.stopping import stoppable
from tilewise.pipelines.video import write_settings, write_video
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.report import method_words
from tilewise.ui.web import media
from tilewise.ui.web.controls import Controls
from tilewise.ui.web.desk import Desk, Job
from tilewise.ui.web.generate_tab import cancel, owner_of, stream
from tilewise.ui.web.highres_wishes import (
    AUTO,
    Wish,
    command_line,
    path_words,
    plan_html,
    planned,
    python_program,
    settings_dict,
    wish_of,
)
from tilewise.ui.web.models import Models
from tilewise.ui.web.sentences import complaint, log_unexpected
from tilewise.ui.web.slider import Slider

FOLDER = "highres"  # of the output folder
CANCELLED = "cancelled; a native clip that was finished is kept"
ABOUT = """The settings on the left make a clip at the model's own size, their attention method included. From that
the clip at the target is made: each query attends to a window of the native size, guided by a path that sees the whole
frame. Both clips go to the folder `highres` of the outputs, each with its settings as JSON beside it; History does not
list them."""


@dataclasses.dataclass(frozen=True)
class HighresMade:
    """Both clips on disk, with their records. objects: how many the detector finds in (clip, native); None where it knows not."""

    work: Work
    path: Path
    native: Path
    record: dict[str, Any]
    native_record: dict[str, Any]
    summary: str
    objects: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class NativeShown:
    """The first clip, while the second is made."""

    html: str


class HighresStudio:
    """Makes clips of two stages. folder: absolute; where they go."""

    def __init__(self, models: Models, folder: Path) -> None:
        self.models, self.folder = models, folder
        self._lock = threading.Lock()
        self._skeletons: dict[str, Any] = {}

    def skeleton(self, model: str) -> Any:
        """With denoisers of the dtype that would run, which the plan of memory counts by. Raises as `Models.skeleton`."""
        self.models.skeleton(model)
        with self._lock:
            if model not in self._skeletons:
                skeleton = load_skeleton(model)  # a copy: others plan with the first one
                dtype = resolve_dtype(self.models.dtype, self.models.device)
                self._skeletons[model] = cast_skeleton(skeleton, dtype)
            return self._skeletons[model]

    def file(self, work: Work) -> Path:
        """The same settings make the same file again."""
        identity = [settings_dict(work), self.models.dtype, self.models.revision(work.native.model)]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{slug(work.target.prompt)}-{work.target.seed}-{key[:8]}{suffix_of(work.target.frames)}"

    def clip(self, wish: Wish, job: Job) -> HighresMade:
        """Both clips. On the worker's thread; raises Cancelled soon after the job is cancelled."""
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        begin = time.perf_counter()
        model = wish.native.model
        if not self.models.is_loaded(model):
            job.tell(f"loading {model}", 0, 1)
        pipe, _ = self.models.pipeline(model)
        load = time.perf_counter() - begin
        work = wish.work(pipe)
        path = self.file(work)
        native = path.with_stem(f"{path.stem}-native")
        for file in (native, path):
            check_writable(file, suffix=file.suffix)
        notes = prompt_notes(pipe, work.target)
        run = {**machine(pipe.device, self.models.dtype), "started": started, "load": load, "notes": notes}

        def write_native(clip: Clip) -> None:
            record = clip_record(clip, run)
            write_video(native, clip.frames, clip.settings.fps, settings=record)
            job.show(NativeShown(_figure(native, record, "native stage; the target follows")))

        peak = PeakMemory(pipe.device)
        peak.start()
        with stoppable(pipe, job.cancelled):
            made = make(pipe, work, job.tell, write_native)
        run["peak_memory"] = peak.read()
        write_video(path, made.frames, work.target.fps, settings=_record(made, run))
        made, objects = self._judged(pipe, made, notes)
        record, native_record = _record(made, run), clip_record(made.native, run)
        if made.clip.content is not None:
            write_settings(path, record)
            write_settings(native, native_record)
        return HighresMade(work, path, native, record, native_record, str(made.clip.summary), objects)

    def _judged(self, pipe: Any, made: HighresClip, notes: list[str]) -> tuple[HighresClip, tuple[int, int] | None]:
        """With what the clips show; a finished clip is worth more than its verdict."""
        try:
            made = judged(pipe, made)
            if made.clip.content is None:
                return made, None
            return made, (analyse(made.frames).count, analyse(made.native.frames).count)
        except Exception as error:
            notes.append(f"the clips could not be judged: {error or type(error).__name__}")
            return made, None


def _record(made: HighresClip, run: dict[str, Any]) -> dict[str, Any]:
    return clip_record(made.clip, {**run, "highres": made.to_dict()})


class HighresTab:
    """Built inside a gr.Tab, which is `tab`."""

    def __init__(self, controls: Controls, desk: Desk, models: Models, outputs: Path, tab: gr.Tab) -> None:
        self.controls, self.desk, self.models = controls, desk, models
        self.studio = HighresStudio(models, outputs / FOLDER)
        gr.Markdown(ABOUT)
        high, wide = self.target(models.names[0])
        with gr.Row():
            height = Slider(16, 4320, high, step=16, label="Target height, pixels", elem_id="highres-height")
            width = Slider(16, 7680, wide, step=16, label="Target width, pixels", elem_id="highres-width")
        with gr.Row():
            # Text, because a number field that is empty from the start sends 0.
            strength = gr.Textbox("", label="Strength (empty: the model's own)", elem_id="highres-strength")
            refresh = gr.Number(
                HighresSettings.refresh, label="Full path every so many steps", elem_id="highres-refresh"
            )
        with gr.Row():
            path = gr.Radio([AUTO, *PATHS], value=AUTO, label="Full path", elem_id="highres-path")
            guided = gr.Radio(
                list(GUIDED), value=HighresSettings.guided, label="Forwards that it guides", elem_id="highres-guided"
            )
        plan = gr.HTML(elem_id="highres-plan")
        with gr.Row():
            go = gr.Button("Make it", variant="primary", elem_id="highres")
            stop = gr.Button("Cancel", variant="stop", elem_id="highres-cancel")
        status = gr.HTML(elem_id="highres-status")
        native = gr.HTML(elem_id="highres-native")
        result = gr.HTML(elem_id="highres-result")
        with gr.Accordion("Summary: what the attention calls of the second stage did", open=False):
            summary = gr.Code(language=None, label="Summary", interactive=False, elem_id="highres-summary")
        with gr.Accordion("The same clip again: settings, command, program", open=False, elem_id="highres-again"):
            settings = gr.Code(language="json", label="Settings", interactive=False, elem_id="highres-settings")
            command = gr.Code(language="shell", label="Command", interactive=False, elem_id="highres-command")
            program = gr.Code(language="python", label="Python", interactive=False, elem_id="highres-program")
        own = [height, width, strength, refresh, path, guided]
        self.count = len(own)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs = [*own, *controls.inputs]
        moved = [tab.select, *(component.change for component in inputs)]
        gr.on(moved, self.plan, inputs, [plan], queue=False, trigger_mode="always_last", **quiet)
        model = controls.components["model"]
        model.input(self.target, [model], [height, width], queue=False, **quiet)
        outputs_ = [status, native, result, summary, settings, command, program]
        go.click(self.run, inputs, outputs_, concurrency_limit=None, **quiet)
        stop.click(self.cancel, None, [status], queue=False, **quiet)

    def target(self, model: str) -> list[Any]:
        """Twice the model's own size."""
        try:
            native = self.models.native(str(model))
        except TilewiseError:
            return [gr.skip()] * 2
        return [2 * native.height, 2 * native.width]

    def plan(self, *given: Any) -> str:
        try:
            return plan_html(
                self._planned(given, prompt="-")[1], self.studio.skeleton(str(self._values(given)["model"]))
            )
        except Exception as error:
            log_unexpected(error)
            return complaint(error)

    def run(self, request: gr.Request, *given: Any) -> Iterator[list[Any]]:
        nothing = [gr.skip()] * 5
        try:
            wish, _ = self._planned(given)
            work = functools.partial(self.studio.clip, wish)
            yield [""] * 7  # what is shown must not be taken for what comes
            for status, native, made in stream(self.desk, owner_of(request), work, CANCELLED):
                if made is None:  # the native clip stays, whatever becomes of the other
                    yield [status, native or gr.skip(), *nothing]
                else:
                    yield ["", "", *self.shown(made)]
        except Exception as error:
            log_unexpected(error)
            yield [complaint(error), gr.skip(), *nothing]

    def cancel(self, request: gr.Request) -> Any:
        return cancel(self.desk, request)

    def shown(self, made: HighresMade) -> list[Any]:
        """Result, summary, settings, command, program."""
        native, dtype = self.models.native(made.work.native.model), self.models.dtype
        told = json.dumps(settings_dict(made.work), indent=2)
        again = [command_line(made.work, native, dtype), python_program(made.work, native, dtype)]
        return [result_html(made), made.summary, told, *again]

    def _values(self, given: Any) -> dict[str, Any]:
        return self.controls.values(given[self.count :])

    def _planned(self, given: Any, prompt: str = "") -> tuple[Wish, Work]:
        """prompt: where there is none."""
        values, limits = self._values(given), self.controls.limits
        values["prompt"] = values["prompt"] or prompt
        wish = wish_of(self.models, limits, values, given[: self.count])
        return wish, planned(self.models, limits, wish, self.studio.skeleton(wish.native.model))


def result_html(made: HighresMade) -> str:
    """Two players that page.js keeps in step, and what is worth knowing."""
    run, target, first = made.record["run"], made.work.target, made.work.native
    found, forwards = run["highres"]["coherence"], run["highres"]["forwards"]
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in run["seconds"].items() if value)
    repeats = f"repetition {found['repetition']:.3f}, native {found['native']:.3f} ({found['excess']:+.3f})"
    guided = f"{forwards['refreshed']} with it, {forwards['reused']} with its cached cross-attention, "
    rows = [
        (
            "clip",
            f"{target.frames} frames of {target.height}×{target.width}, {target.fps:g} a second, seed {target.seed}",
        ),
        (
            "native stage",
            f"{first.height}×{first.width}, {method_words(first)}, {made.native_record['run']['seconds']['total']:.2f} s",
        ),
        ("seconds of the second stage", seconds),
        ("coherence", f"{repeats}; sharpness {found['sharpness']:.2f} × the native clip scaled up"),
        ("full path", f"{path_words(made.work.options)}; forwards: {guided}{forwards['unguided']} without"),
        ("fallbacks to dense", "; ".join(f"{n} calls: {why}" for why, n in run["fallbacks"].items()) or "none"),
    ]
    if made.objects is not None:
        rows.insert(4, ("objects found", f"{made.objects[0]}, in the native clip {made.objects[1]}"))
    if run["content"]:
        shown = [f"{k.replace('_', ' ')} {'yes' if v else 'no'}" for k, v in run["content"].items() if v is not None]
        rows.append(("prompt shown", ", ".join(shown)))
    if run["peak_memory"].get("bytes"):
        rows.append(("peak memory", f"{media.size(run['peak_memory']['bytes'])} ({run['peak_memory']['of']})"))
    cells = [(name, escape(words)) for name, words in rows]
    cells.append(("density of the window", media.bar(run["density"], f"{run['density']:.3f}")))
    notes = "".join(f"<p>{escape(note)}</p>" for note in run["notes"])
    figures = _figure(made.native, made.native_record, "native stage") + _figure(
        made.path, made.record, "at the target"
    )
    button = '<p class="tw-pair-buttons"><button type="button" class="tw-play">Play or pause both</button></p>'
    return f'<div class="tw-pair" data-sync>{figures}{button}</div>{media.table(cells)}{notes}'


def _figure(path: Path, record: dict[str, Any], words: str) -> str:
    player = media.video(path, f"{words}: {record['prompt']}", version=record["run"]["frames_sha256"][:12])
    told = escape(f"{words}, {record['height']}×{record['width']}")
    return f"<figure>{player}<figcaption>{told}<br>{media.download(path, 'Download')}</figcaption></figure>"
