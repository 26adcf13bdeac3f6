"""Reproduce a clip without the page: a command line and a Python program, both ready to run."""

from __future__ import annotations

import pprint
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tilewise.pipelines.conditioning.inputs import Inputs
from tilewise.pipelines.generation.method_options import PREFIX, field_name, flag
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.model_defaults import ModelDefaults, guider_of
from tilewise.pipelines.media.files import suffix_of
from tilewise.pipelines.options import options_of
from tilewise.plugins.additions.base import additions_text
from tilewise.plugins.config import SHARED_OPTIONS, Config, presets, resolve
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import methods
from tilewise.plugins.methods.option_text import format_value
from tilewise.plugins.models.common.native_size import call_parameters
from tilewise.ui.common.options import method_config


def command_line(settings: GenerateSettings, native: ModelDefaults, dtype: str, clip: Path) -> str:
    """`tilewise generate …`. What the command's options cannot say, the clip can: `--from`.

    native: the model's own settings. dtype: of the weights. clip: the file whose metadata holds these settings.
    """
    method, words = method_words(settings.method), setting_words(settings, native)
    if method is None or words is None:
        return shlex.join(["tilewise", "generate", "--from", str(clip), "--out", f"again{clip.suffix}"])
    words = ["tilewise", "generate", "--model", settings.model, *method, *words, "--dtype", dtype]
    # A prompt may begin with a dash.
    return shlex.join([*words, "--", settings.prompt])


def setting_words(settings: GenerateSettings, native: ModelDefaults, without: Collection[str] = ()) -> list[str] | None:
    """The options of the command for settings beside prompt, model and method; None if no option can say one of them.

    native: the model's own settings, of which some need not be said. without: settings to leave out.
    """
    usual = {
        one.name: one.default
        for one in options_of(GenerateSettings).values()
        if one.names_file or one.name == "strength"
    }
    usual |= {"negative": "", "fps": native.fps, "max_sequence_length": native.max_sequence_length}
    words: list[str] = []
    for name in options_of(GenerateSettings):
        value = getattr(settings, name)
        if name in ("prompt", "model", "method", *without) or (name in usual and value == usual[name]):
            continue
        if value is None:
            return None
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"{flag}={one}"] if isinstance(one, str) else [flag, repr(one)]
    return words


def method_words(config: Config) -> list[str] | None:
    """The options of the command that stand for a method, or None if it takes more than they can say."""
    best: tuple[str, dict[str, str]] | None = None
    for name in (*presets(), *methods()):
        if resolve(name).method.name != config.method.name:
            continue
        fields = _differences(resolve(name), config)
        try:
            same = method_config(name, fields) == config
        except ConfigError:
            continue
        if same and (best is None or len(fields) < len(best[1])):
            best = name, fields
    if best is None:
        return None
    words = ["--method", best[0]]
    for field, text in best[1].items():
        words += ["--set", f"{field.removeprefix(PREFIX)}={text}"] if field.startswith(PREFIX) else [flag(field), text]
    return words


def _differences(base: Config, config: Config) -> dict[str, str]:
    """Fields of a request (`method_options`) that make one config of another, as text; those that are none exclude others."""
    options, usual = config.method.to_dict(), base.method.to_dict()
    groups = [group for group in config.method.exclusive if any(options[name] is not None for name in group)]
    taken_back = {name for group in groups for name in group if options[name] is None}
    changed = {name: value for name, value in options.items() if value != usual[name] and name not in taken_back}
    changed |= {
        option: getattr(config, option)
        for option in SHARED_OPTIONS
        if option != "steps_sparse" and option not in options and getattr(config, option) != getattr(base, option)
    }
    if config.steps != base.steps:
        changed["steps_sparse"] = config.steps
    if changed.get("add", ()) != ():
        changed["add"] = additions_text(config.additions)
    return {field_name(name): format_value(value) for name, value in changed.items()}


def python_program(pipe: Any, settings: GenerateSettings, dtype: str) -> str:
    """A program that makes the clip with diffusers' own call. pipe: may be a skeleton; its signature is all that is read."""
    arguments = call_arguments(pipe, settings)
    del arguments["generator"]
    call = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    lines = ["import torch", "", "import tilewise", "from tilewise.pipelines.loading.load import load_pipeline"]
    lines += ["from tilewise.pipelines.media.video import write_video", ""]
    lines += [f"pipe = load_pipeline({settings.model!r}, dtype={dtype!r})  # any diffusers pipeline will do"]
    if guider_of(pipe) is not None:
        lines += [f"pipe.guider = pipe.guider.new(guidance_scale={settings.guidance!r})"]
    if not settings.is_dense:
        lines += [f"tilewise.patch(pipe, {_method_expression(settings.method)})"]
    inputs = Inputs.of(settings)
    if inputs.files or inputs.strength is not None:
        call += "    **files,\n"
        named = {role: getattr(settings, role) for role in inputs.files}
        at = {name: getattr(inputs, name) for name in ("height", "width", "frames", "strength")}
        said = ", ".join(f"{name}={value!r}" for name, value in at.items())
        lines.insert(3, "from tilewise.pipelines.conditioning.inputs import Inputs, files_of, input_arguments")
        lines += [f"files = input_arguments(pipe, Inputs(files_of({named!r}), {said}))"]
    lines += [f"frames = pipe(\n{call}    generator=torch.Generator('cpu').manual_seed({settings.seed}),"]
    image = "num_frames" not in call_parameters(pipe) and settings.video is None  # a list of pictures, and not of clips
    lines += ["    output_type='np',", "    return_dict=False,", ")[0][:1]" if image else ")[0][0]"]
    if not settings.is_dense:
        lines += ["print(tilewise.summary(pipe))"]
    lines += [f"write_video('clip{suffix_of(settings.frames)}', frames, fps={settings.fps:g})"]
    return "\n".join(lines) + "\n"


def _method_expression(config: Config) -> str:
    for name in (*presets(), *methods()):
        if resolve(name) == config:
            return repr(name)
    return f"tilewise.Config.from_dict({pprint.pformat(config.to_dict(), width=100, sort_dicts=False)})"
