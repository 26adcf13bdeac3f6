"""The form of the high-resolution tab: its values as settings of both stages, the plan, and snippets that make the same clip.

The controls on the left are the native stage's. All is decided on the skeleton, before weights are read.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from tilewise.pipelines.batch.job import Stages
from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.preparation import SHARED_BY_STAGES, Work, prepare
from tilewise.pipelines.highres.settings import HighresSettings, steps_to_run
from tilewise.pipelines.loading.model_defaults import ModelDefaults, model_defaults
from tilewise.pipelines.media.files import suffix_of
from tilewise.pipelines.memory.units import gib
from tilewise.pipelines.options import field_values, options_of
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.guidance.global_path import global_paths
from tilewise.ui.web.common.media import share_rows, table
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms.form_parsing import _whole, refuse_lost, settings_from, settings_of
from tilewise.ui.web.forms.option_controls import given_values, said_values
from tilewise.ui.web.forms.snippets import _method_expression, method_words, setting_words
from tilewise.ui.web.jobs.models import Models

OPTIONS = options_of(HighresSettings)
FIELDS = ("height", "width", *OPTIONS)
"""The tab's own controls, in the order in which handlers get them."""


@dataclasses.dataclass(frozen=True)
class HighresRequest:
    """native: the first stage, checked. height, width: of the clip, pixels. options: of the second stage."""

    native: GenerateSettings
    height: int
    width: int
    options: HighresSettings

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `request_from` reads."""
        size = {"height": self.height, "width": self.width}
        return {"native": self.native.to_dict(), **size, "options": self.options.to_dict()}

    def work(self, pipe: Any, device: torch.device | None = None) -> Work:
        """As `prepare`, for a loaded pipeline, or for a skeleton with the device that it would run on."""
        first = self.native
        shared = {name: getattr(first, name) for name in SHARED_BY_STAGES}
        size = (first.height, first.width)
        return prepare(pipe, first.prompt, self.height, self.width, size, first.method, self.options, shared, device)


def highres_request(models: Models, limits: Limits, values: Mapping[str, Any], own: Sequence[Any]) -> HighresRequest:
    """values: of the shared controls. own: of FIELDS. Raises ConfigError for what cannot be, RefusedError beyond the caps."""
    said = dict(zip(FIELDS, own, strict=True))
    native = settings_of(models, limits, values)
    height, width = (_whole(f"target {name}", said[name]) or 0 for name in ("height", "width"))
    limits.check_work(height, width, native.frames, native.steps)
    options = HighresSettings(**field_values(HighresSettings, given_values(OPTIONS, said)))
    return HighresRequest(native, height, width, options)


def request_from(told: Mapping[str, Any], models: Models, limits: Limits) -> HighresRequest:
    """What `HighresRequest.to_dict` wrote, checked as in `highres_request`."""
    native = settings_from(told["native"], models, limits)
    limits.check(native)
    height, width = (_whole(f"target {name}", told[name]) or 0 for name in ("height", "width"))
    limits.check_work(height, width, native.frames, native.steps)
    return HighresRequest(native, height, width, HighresSettings.from_dict(told["options"]))


def stages_in(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Stages] | None:
    """The target's settings and both stages, from a clip's metadata or from the settings that the tab shows.

    None for a clip of one stage. Raises ConfigError for what cannot be read.
    """
    run = values.get("run")
    try:
        if isinstance(run, Mapping) and run.get("highres") is not None:
            return values, Stages.from_dict(run["highres"])
        if "highres" in values:
            return values["target"], Stages.from_dict({"native": values["native"], "options": values["highres"]})
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the settings of the two stages cannot be read: {str(error)[:200]}") from error
    return None


def own_values(target: GenerateSettings, stages: Stages, skeleton: Any) -> list[Any]:
    """What each of FIELDS should say for `highres_request` to give these stages again.

    Raises ConfigError for stages with options that no control has.
    """
    options = stages.options
    said = {**said_values(OPTIONS, options), "max_memory": ""}  # which says where a clip fits, and not what it shows
    again = HighresSettings(**field_values(HighresSettings, given_values(OPTIONS, said)))
    now = again.for_model(model_defaults(skeleton), global_paths(skeleton)).to_dict()
    refuse_lost({k: value for k, value in options.to_dict().items() if k != "max_memory" and value != now[k]})
    return [target.height, target.width, *said.values()]


def planned(models: Models, limits: Limits, clip_request: HighresRequest, skeleton: Any) -> Work:
    """Both stages, checked on a skeleton whose denoisers have the page's dtype. Raises as `prepare`, and RefusedError."""
    work = clip_request.work(skeleton, models.device)
    limits.check(work.target)
    return work


def plan_html(work: Work, skeleton: Any) -> str:
    """What would run: sizes, window, steps, memory."""
    first, target, options = work.native, work.target, work.options
    assert options.strength is not None
    rows = [("size", f"{first.height}×{first.width} → <b>{target.height}×{target.width}</b> pixels")]
    explanation = explain_settings(skeleton, target)
    method: Any = target.method.method
    for row in explanation.rows:
        prefix = f"{row.denoiser}: " if len(explanation.rows) > 1 else ""
        tokens = f"{method.native[0]}×{method.native[1]} of {escape(row.grid)}, in all latent frames"
        rows += [
            (f"{prefix}window, tokens", tokens),
            *share_rows(row.density, row.cost, f"{prefix}density of the window"),
        ]
    left = steps_to_run(target.steps, options.strength)
    rows += [
        ("steps of the second stage", f"{left} of {target.steps} (strength {options.strength:g})"),
        ("full path", escape(path_words(options))),
    ]
    plan = work.plan
    memory = {
        "memory, at most": f"{gib(plan.peak)} of {gib(plan.limit)}, without the text encoder",
        "denoising": f"{gib(plan.denoise)}: weights {gib(plan.weights)}, activations {gib(plan.activations)}, "
        f"cache {gib(plan.cache_on_device)}",
        "decoding": f"{gib(plan.decode)}: weights {gib(plan.weights)}, VAE {gib(plan.vae)}",
    }
    rows += [(name, escape(words)) for name, words in memory.items()]
    gives = [
        words
        for words, on in (
            ("the VAE in tiles", plan.vae_tiling),
            (f"{gib(plan.on_host)} of the cache in host memory", plan.on_host > 0),
            ("parts that are not at work off the device", plan.offload),
        )
        if on
    ]
    rows += [("to fit", escape("; ".join(gives) or "nothing has to give"))]
    notes = "".join(f"<p>{escape(note)}</p>" for note in work.notes)
    return f'<div class="tw-plan">{table(rows)}{notes}</div>'


def path_words(options: HighresSettings) -> str:
    if options.global_path == "none":
        return "none: the window alone"
    often = "each step" if options.refresh == 1 else f"one step of {options.refresh}"
    whom = "all forwards" if options.guided == "all" else "the prompt's forwards"
    return f"{options.global_path}, at {often}, guides {whom}"


def settings_dict(work: Work) -> dict[str, Any]:
    """JSON values only: both stages' settings and the second's options."""
    return {"native": work.native.to_dict(), "target": work.target.to_dict(), "highres": work.options.to_dict()}


def command_line(work: Work, native: ModelDefaults, dtype: str) -> str:
    """`tilewise generate … --highres …`; for what its options cannot say, a comment that says so.

    native: the model's own settings. dtype: of the weights.
    """
    first, options = work.native, work.options
    method = method_words(first.method)
    shared = setting_words(first, native, without=("height", "width"))
    if method is None or shared is None:
        lost = "the options of the native stage's method" if shared is not None else "text tokens"
        return f"# tilewise generate --highres has no option for {lost}: run the Python program below"
    words = ["tilewise", "generate", "--model", first.model, *method, "--highres"]
    words += ["--height", str(work.target.height), "--width", str(work.target.width)]
    words += ["--native", f"{first.height}x{first.width}", *shared, "--dtype", dtype]
    chosen = chosen_options(options, native)
    for name, value in said_values(OPTIONS, options).items():
        if OPTIONS[name].field not in chosen:
            continue
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join([*words, "--", first.prompt])  # a prompt may begin with a dash


def chosen_options(options: HighresSettings, native: ModelDefaults) -> dict[str, Any]:
    """The options that decide most, and those that are not as the model's defaults have them."""
    path = options.global_path or "none"
    usual = HighresSettings(global_path=path).for_model(native, (path,)).to_dict()
    always = ("strength", "refresh", "global_path", "guided")
    return {name: value for name, value in options.to_dict().items() if name in always or value != usual[name]}


def python_program(work: Work, native: ModelDefaults, dtype: str) -> str:
    """A program that makes both clips."""
    first, target, options = work.native, work.target, work.options
    method = _method_expression(first.method)
    stage = chosen_options(options, native)
    shared = {name: getattr(first, name) for name in ("negative", "frames", "steps", "guidance", "seed")}
    lines = ["import tilewise"]
    load = [f"pipe = load_pipeline({first.model!r}, dtype={dtype!r})"]
    if first.max_sequence_length == native.max_sequence_length:
        size = {"height": target.height, "width": target.width, "native": (first.height, first.width)}
        lines += ["from tilewise.pipelines.loading.load import load_pipeline"]
        call = [f"made = tilewise.highres(\n    pipe,\n    {first.prompt!r},\n    native_method={method},"]
        call += [f"    {name}={value!r}," for name, value in {**size, **shared, **stage}.items()]
        call += [")"]
    else:  # `tilewise.highres` does not take a number of text tokens; its two halves do
        lines += ["from tilewise.pipelines.highres.two_stages import make"]
        lines += ["from tilewise.pipelines.highres.settings import HighresSettings"]
        lines += ["from tilewise.pipelines.highres.preparation import prepare"]
        lines += ["from tilewise.pipelines.loading.load import load_pipeline"]
        shared = {"model": first.model, **shared, "max_sequence_length": first.max_sequence_length}
        given = ", ".join(f"{name}={value!r}" for name, value in stage.items())
        call = [
            f"options = HighresSettings({given})",
            f"shared = {shared!r}",
            f"native = {(first.height, first.width)!r}",
        ]
        call += [
            f"work = prepare(\n    pipe, {first.prompt!r}, {target.height}, {target.width}, native, {method}, options, shared\n)"
        ]
        call += ["made = make(pipe, work)"]
    lines += ["from tilewise.pipelines.media.video import write_video", ""]
    writes = [f"write_video({name!r}, {what}.frames, fps={first.fps:g})" for name, what in
              ((f"native{suffix_of(first.frames)}", "made.native"), (f"highres{suffix_of(first.frames)}", "made"))]  # fmt: skip
    return "\n".join([*lines, *load, *call, "print(made.clip.summary)", *writes]) + "\n"
