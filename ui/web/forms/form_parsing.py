"""Convert the values of the controls to settings, and settings to values of the controls.

Values come from a browser, or from whoever talks to the server without one: nothing is taken for granted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tilewise.pipelines.conditioning.files import ROLES, SEVERAL
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import MAX_SEED, GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.options import Option, options_of
from tilewise.plugins.additions.base import additions_text
from tilewise.plugins.config import DEFAULT_STEPS, Config, presets, resolve
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import make_method, methods
from tilewise.plugins.methods.option_text import NONE
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.forms.method_controls import FIELDS as MEASURE_FIELDS
from tilewise.ui.web.forms.method_controls import MEASURES, is_per_head, measure_values, measured, measures_of
from tilewise.ui.web.jobs.models import Models

METHOD_FIELDS = (
    "method", *MEASURE_FIELDS, "options", "from_step", "to_step", "step_numbers", "blocks", "cache", "add", "calibration",
)  # fmt: skip
FIRST = "sta-balanced"  # what the page begins with, and shows beside a calibration
# Visitors name no files of the server; those that they upload are kept by the page (`uploads.py`).
SETTINGS = {
    name: option for name, option in options_of(GenerateSettings).items() if not option.names_file or name in ROLES
}
FIELDS = tuple(field for name in SETTINGS for field in (METHOD_FIELDS if name == "method" else (name,)))
"""The controls, in the order in which handlers get them: the method has several, each other setting one."""


def choices() -> list[tuple[str, str]]:
    """(label, name) of every preset and every method that is registered, methods of other packages among them."""
    named = [(f"{name} (preset)", name) for name in presets()]
    return named + [(name, name) for name in methods()]


def settings_of(models: Models, limits: Limits, values: Mapping[str, Any]) -> GenerateSettings:
    """The settings that FIELDS say, resolved and checked for the model.

    Raises ConfigError for what cannot be, RefusedError for a model that is not offered or work beyond the caps.
    """
    model = str(values["model"])
    skeleton = models.skeleton(model)
    # The caps come first: even the plan of a clip that is far too large takes long to make.
    limits.check_work(*(_whole(name, values[name]) or 0 for name in ("height", "width", "frames", "steps")))
    said = {name: _value(option, values[name]) for name, option in SETTINGS.items() if name not in METHOD_FIELDS}
    limits.check_text_tokens(said["max_sequence_length"])
    limits.check_files(said)
    settings = resolve_settings(skeleton, **{**said, "method": config_of(values), "model": model})
    call_arguments(skeleton, settings)
    limits.check(settings)
    return settings


def said_of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings by name as the controls say them, in their own types. Raises ConfigError."""
    return {name: _value(SETTINGS[name], values[name]) for name in names}


def config_of(values: Mapping[str, Any]) -> Config:
    """The method of the controls with its options and schedule. Raises ConfigError."""
    beside: dict[str, Any] = {name: str(values[name] or NONE) for name in ("cache", "add")}
    if text := str(values.get("calibration") or "").strip():
        return dataclasses.replace(calibration(text), **beside)
    name = str(values["method"])
    base = resolve(name) if name in (*presets(), *methods()) else None
    if base is None:
        raise ConfigError(f"there is no method or preset {name!r} here")
    options = _options(values["options"]) or {}
    if base.method.name == "dense":
        if options:
            raise ConfigError(f"dense has no options, not {', '.join(options)}")
        return resolve("dense", **beside)
    for measure in measures_of(name):
        if measure in options and not is_per_head(options[measure]):
            raise ConfigError(
                f"{measure} has a control of its own, where the method is chosen; take it out of the options"
            )
    given = {option for option, value in options.items() if value is not None}
    kept = {} if any(measure in options for measure in MEASURES) else measured(name, values)
    # An option that says how much is kept, and has no control, counts for more than the control that is always there.
    replaced = {one for group in base.method.exclusive if given.intersection(group) for one in group}
    kept = {measure: value for measure, value in kept.items() if measure not in replaced}
    method = make_method(base.method.name, {**options, **kept})
    numbers = str(values.get("step_numbers") or "").strip()
    steps = numbers or (_number("from", values["from_step"]), _number("to", values["to_step"]))
    return dataclasses.replace(base, method=method, steps=steps, blocks=str(values["blocks"] or ":"), **beside)


def calibration(text: str) -> Config:
    """A method that stands in a file of `tilewise calibrate`, with its schedule, from the file's text. Raises ConfigError."""
    config = Config.from_dict(json_object(text))
    if config.method.made_by is None:
        raise ConfigError(f"{config.method.name!r} is no calibration: a file of `tilewise calibrate` holds one")
    return config


def values_of(settings: GenerateSettings) -> dict[str, Any]:
    """What each of FIELDS should say for `settings_of` to give these settings again.

    Raises ConfigError for a method with settings that no control has.
    """
    config = settings.method
    values = {name: getattr(settings, name) for name in SETTINGS}
    values |= dict.fromkeys(SEVERAL)  # an upload field that is empty says None
    for role, files in files_of(vars(settings)).items():
        paths = [str(file.path) for file in files]
        values[role] = paths if role in SEVERAL else paths[0]
    values |= {"method": name_of(config), **method_values(config), "seed": str(settings.seed)}
    again = (
        config if config.method.name == "dense" else config_of(values)
    )  # a schedule changes nothing where all is dense
    names = [field.name for field in dataclasses.fields(Config)]
    lost = {name: getattr(config, name) for name in names if getattr(again, name) != getattr(config, name)}
    for name, option in options_of(GenerateSettings).items():
        if name not in SETTINGS and getattr(settings, name) != option.default:
            lost[name] = getattr(settings, name)
    refuse_lost(lost)
    return values


def refuse_lost(lost: Mapping[str, Any]) -> None:
    """Raises ConfigError if there is anything that a clip was made with and no control says; lost: those, by name."""
    if lost:
        told = ", ".join(f"{name} {value!r}" for name, value in lost.items())
        raise ConfigError(
            f"the page has no control for {told}, with which this clip was made; `tilewise generate --from CLIP` makes it again"
        )


def method_values(config: Config) -> dict[str, Any]:
    """Options and schedule of a method, for their controls."""
    if config.method.made_by is not None:
        given = dataclasses.replace(config, cache=None, add=None)
        first = method_values(dataclasses.replace(resolve(FIRST), cache=config.cache, add=config.add))
        return {**first, "calibration": json.dumps(given.to_dict())}
    own = {key: value for key, value in config.method.to_dict().items() if key != "name"}
    measures = measures_of(config.method.name)
    options = {key: value for key, value in own.items() if key not in measures or is_per_head(value)}
    low, high = DEFAULT_STEPS if isinstance(config.steps, str) else config.steps
    return {
        **measure_values(config),
        "options": json.dumps(options) if options else "{}",
        "from_step": low,
        "to_step": high,
        "step_numbers": config.steps if isinstance(config.steps, str) else "",
        "blocks": config.blocks,
        "cache": NONE if config.cache is None else str(config.cache),
        "add": additions_text(config.additions),
        "calibration": "",
    }


def name_of(config: Config) -> str:
    """The preset that a config is, or its method's name; of a calibration, which is none of them, the method beside it."""
    if config.method.made_by is not None:
        return FIRST
    return next((name for name, preset in presets().items() if preset == config), config.method.name)


def json_object(text: str) -> dict[str, Any]:
    """What somebody pasted. Raises ConfigError."""
    if len(text) > 10**6:
        raise ConfigError("that is too long for settings")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the settings are not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ConfigError("settings are a JSON object, as this page shows them under a clip")
    return values


def settings_from(values: Mapping[str, Any], models: Models, limits: Limits) -> GenerateSettings:
    """Settings as `to_dict` writes them, or the whole metadata of a clip. Raises ConfigError, RefusedError for a model or files
    that this page does not have."""
    names = {field.name for field in dataclasses.fields(GenerateSettings)}
    try:
        settings = GenerateSettings.from_dict({k: v for k, v in values.items() if k in names})
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the settings cannot be read: {str(error)[:200]}") from error
    models.skeleton(settings.model)
    limits.check_files(vars(settings))
    return settings


def _options(text: Any) -> dict[str, Any] | None:
    """The options of a method from JSON; None where nothing is said."""
    if text is None or not str(text).strip():
        return None
    try:
        value = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f'the options of the method are no JSON object such as {{"tile": [6, 8, 8]}}: {error}'
        ) from error
    if not isinstance(value, dict):
        raise ConfigError('the options of the method are a JSON object such as {"tile": [6, 8, 8]}')
    return value


def _value(option: Option, value: Any) -> Any:
    """A setting from its control. Raises ConfigError."""
    words = option.name.replace("_", " ")
    if option.name == "seed":
        return _seed(value)
    if option.name in ROLES:
        several = [value] if isinstance(value, str) and value else list(value or ())
        return tuple(map(str, several)) if option.name in SEVERAL else str(several[0]) if several else None
    if option.kind == "whole":
        return _whole(words, value, option.optional)
    if option.optional and (value is None or value == ""):
        return None
    return _number(words, value) if option.kind == "number" else str(value or "")


def _whole(name: str, value: Any, optional: bool = False) -> int | None:
    if value is None or value == "":
        if optional:
            return None
        raise ConfigError(f"{name} is empty: give a whole number")
    number = _number(name, value)
    if number != int(number):
        raise ConfigError(f"{name} must be a whole number, not {value}")
    return int(number) or (None if optional else 0)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a number, not {str(value)[:40]!r}")
    return number


def _seed(value: Any) -> int:
    """A seed has up to 63 bits, which no number of a browser holds: it comes as text."""
    text = str(value).strip()
    if text.endswith(".0"):
        text = text[:-2]
    if not text.isdecimal() or len(text) > 19 or int(text) > MAX_SEED:
        raise ConfigError(f"the seed must be a whole number from 0 to 2^63 - 1, not {text[:40]!r}")
    return int(text)
