"""The controls that all tabs share: prompt, method, size. Their order is that of `form_parsing.FIELDS`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.conditioning.files import ROLES
from tilewise.plugins.additions.base import all_additions
from tilewise.plugins.config import resolve
from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.methods.base import methods
from tilewise.plugins.methods.option_text import NONE
from tilewise.plugins.step_caches.options import CACHES
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms import plan_panel
from tilewise.ui.web.forms.file_controls import FileControls
from tilewise.ui.web.forms.form_parsing import (
    FIELDS,
    FIRST,
    METHOD_FIELDS,
    SETTINGS,
    calibration,
    choices,
    method_values,
    settings_of,
)
from tilewise.ui.web.forms.method_controls import MethodControls
from tilewise.ui.web.forms.option_controls import control
from tilewise.ui.web.forms.slider import Slider
from tilewise.ui.web.jobs.models import Models

PROMPT = "a red circle moving right on a blue background"  # in the words of the demo model
PLANNING = '<p class="tw-quiet">planning …</p>'  # until the first plan is there: diffusers may still be imported
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
SIZED = ("height", "width", "frames", "steps", "guidance", "fps", "max_sequence_length")  # controls that a model sets
FOLLOWING = ("height", "width", "frames", "fps")  # those that follow from a picture or video


class Controls:
    """Built inside a gr.Blocks. `inputs`: the components in the order of FIELDS. `panel`: the plan.

    prompt: its text box, which stands elsewhere on the page.
    """

    def __init__(self, models: Models, limits: Limits, prompt: Any) -> None:
        self.models, self.limits = models, limits
        native = models.defaults(models.names[0])
        first = method_values(resolve(FIRST))
        made: dict[str, Any] = {"prompt": prompt}
        made["model"] = gr.Dropdown(
            models.names, value=models.names[0], label="Model", elem_id="model", visible=len(models.names) > 1
        )
        made["method"] = gr.Dropdown(choices(), value=FIRST, label="Attention method", elem_id="method")
        self.kept = MethodControls(resolve(FIRST))
        made |= self.kept.components
        self.files = FileControls(limits.inputs)
        made |= self.files.components
        with gr.Row():
            made["height"] = Slider(16, 2160, native.height, step=16, label="Height, pixels", elem_id="height")
            made["width"] = Slider(16, 3840, native.width, step=16, label="Width, pixels", elem_id="width")
        with gr.Row():
            made["frames"] = Slider(1, 257, native.frames, step=4, label="Frames", elem_id="frames")
            made["steps"] = Slider(1, 100, native.steps, step=1, label="Steps", elem_id="steps")
        with gr.Row(elem_id="seed-row"):
            made["seed"] = gr.Textbox("0", label="Seed", elem_id="seed", min_width=80, scale=3)
            self.dice = gr.Button("Random", elem_id="dice", min_width=84, scale=0)
            made["guidance"] = gr.Number(
                native.guidance, label="Guidance (1: none)", elem_id="guidance", min_width=80, scale=3
            )
        with gr.Accordion("More", open=False, elem_id="more"):
            made["negative"] = gr.Textbox("", label="What the clip should not show", elem_id="negative")
            made["options"] = gr.Textbox(
                first["options"], label="Other options of the method, as JSON", elem_id="options", max_lines=4
            )
            with gr.Row():
                made["from_step"] = Slider(
                    0, 1, first["from_step"], step=0.05, label="Sparse from (share of the steps)", elem_id="from-step"
                )
                made["to_step"] = Slider(
                    0, 1, first["to_step"], step=0.05, label="Sparse to (share of the steps)", elem_id="to-step"
                )
            made["step_numbers"] = gr.Textbox(
                first["step_numbers"], label="Sparse steps by number, such as 1: (empty: by the shares above)",
                elem_id="step-numbers",
            )  # fmt: skip
            made["blocks"] = gr.Textbox(first["blocks"], label="Sparse blocks, such as 1: or 0,3:9", elem_id="blocks")
            made["cache"] = gr.Dropdown(
                [NONE, *CACHES], value=first["cache"], allow_custom_value=True, elem_id="cache",
                label="Step cache, with options such as first-block:threshold=0.1",
            )  # fmt: skip
            made["add"] = gr.Dropdown(
                [NONE, *all_additions()], value=first["add"], allow_custom_value=True, elem_id="add",
                label="Put on the model beside it, with options such as broadway:alpha=0.6, joined by +",
            )  # fmt: skip
            made["calibration"] = gr.Textbox(
                first["calibration"], label="Calibration, in place of the method, its steps and its blocks", lines=1,
                max_lines=3, elem_id="calibration",
            )  # fmt: skip
            self.calibrated = gr.UploadButton(
                "Calibration file (JSON, of tilewise calibrate)",
                file_types=[".json"],
                elem_id="calibration-file",
                size="sm",
            )
            with gr.Row():
                made["fps"] = gr.Number(native.fps, label="Frames per second", elem_id="fps")
                made["max_sequence_length"] = gr.Number(
                    native.max_sequence_length,
                    label="Text tokens (empty: the model's)",
                    precision=0,
                    elem_id="max-sequence-length",
                )
            # A setting without a control of its own above.
            made |= {name: control(option) for name, option in SETTINGS.items() if name not in made}
        self.components = made
        with gr.Accordion("Plan", open=True, elem_id="plan-box"):
            self.panel = gr.HTML(PLANNING, label="Plan", elem_id="plan")
        # What else follows the controls is chained to this event. Gradio repeats an event as a whole when one of its handlers
        # with "always_last" was busy, and two of them on one event would keep each other busy for ever.
        self.moved = gr.on(
            [component.change for component in self.inputs], self.refresh, self.inputs, [self.panel, *self.kept.shown],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        return [self.components[name] for name in FIELDS]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """What the controls say, by name; files that were uploaded are kept from here on. Raises as `Uploads.kept`."""
        return self.files.kept(dict(zip(FIELDS, given, strict=True)))

    def wire(self, opened: Any) -> None:
        """The plan follows the event `opened` too; another model or method brings its own settings."""
        opened.then(self.plan, self.inputs, [self.panel], **QUIET)
        self.dice.click(random_seed, None, [self.components["seed"]], **QUIET)
        own = [self.components[name] for name in METHOD_FIELDS[1:]]
        # .input is for the user's own choice: settings that are loaded as a whole bring their options along.
        self.components["method"].input(self.method_chosen, [self.components["method"]], own, **QUIET)
        self.calibrated.upload(read_calibration, [self.calibrated], [self.components["calibration"]], **QUIET)
        sized, model = [self.components[name] for name in SIZED], self.components["model"]
        model.input(self.model_chosen, [model], sized, **QUIET)
        opened.then(self.files_shown, [model], self.files.shown, **QUIET)
        # .change: settings that are loaded as a whole bring their files along. Not "always_last", as `moved` is of this event.
        model.change(self.files_shown, [model], self.files.shown, trigger_mode="multiple", **QUIET)
        files, followed = [self.components[role] for role in ROLES], [self.components[name] for name in FOLLOWING]
        gr.on([one.upload for one in files], self.files_chosen, [model, *files], followed, **QUIET)

    def refresh(self, *given: Any) -> list[Any]:
        """The plan, and which controls of the method are there."""
        said = dict(zip(FIELDS, given, strict=True))
        return [self.plan(*given), *self.kept.show(said["method"], said["measure"])]

    def plan(self, *given: Any) -> str:
        try:
            values = self.values(given)
            values["prompt"] = values["prompt"] or "-"  # the plan does not depend on it
            return plan_panel.plan_html(self.models, settings_of(self.models, self.limits, values))
        except Exception as error:
            log_unexpected(error)
            return error_html(error)

    def method_chosen(self, name: str) -> list[Any]:
        try:
            values = method_values(resolve(str(name)))
        except TilewiseError:
            return [gr.skip()] * len(METHOD_FIELDS[1:])
        return [values[field] for field in METHOD_FIELDS[1:]]

    def model_chosen(self, name: str) -> list[Any]:
        try:
            return list(self.model_values(str(name)).values())
        except TilewiseError:
            return [gr.skip()] * len(SIZED)

    def files_shown(self, name: str) -> list[Any]:
        """Which files a model takes."""
        try:
            return self.files.show(self.models.skeleton(str(name)))
        except TilewiseError:
            return [gr.skip()] * len(self.files.shown)

    def files_chosen(self, name: str, *files: Any) -> list[Any]:
        """The size that follows from the files; the plan says what is wrong with them."""
        try:
            return self.files.size(self.models.skeleton(str(name)), self.models.defaults(str(name)), files)
        except TilewiseError:
            return [gr.skip()] * len(FOLLOWING)

    def model_values(self, name: str) -> dict[str, Any]:
        """What the controls of SIZED say for a model of its own. Raises RefusedError for one that is not offered."""
        native = self.models.defaults(name)
        shape = [native.height, native.width, native.frames, native.steps]
        return dict(zip(SIZED, [*shape, native.guidance, native.fps, native.max_sequence_length], strict=True))


def prompt_box() -> Any:
    """The prompt, inside a gr.Blocks."""
    return gr.Textbox(PROMPT, label="Prompt", lines=3, max_lines=8, elem_id="prompt")


def read_calibration(file: str) -> str:
    """The text of a calibration that was uploaded. Raises gr.Error for another file."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        calibration(text)
    except (OSError, ValueError, TilewiseError) as error:
        raise gr.Error(str(error)) from error
    return text


def random_seed() -> str:
    """One of those that are short enough to be told."""
    return str(secrets.randbelow(2**31))


def method_help() -> str:
    """Markdown: each method and what its options are, from the methods themselves."""
    import dataclasses

    from tilewise.plugins.methods.base import _REGISTRY

    lines = []
    for name in methods():
        cls = _REGISTRY[name]
        options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls)) or "none"
        first = (cls.__doc__ or "").strip().splitlines()[0]
        lines.append(f"- **{name}**: {first} Options: {options}.")
    return "\n".join(lines)
