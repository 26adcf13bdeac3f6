"""Controls for declared options (`tilewise.pipelines.options`), and conversion of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from tilewise.pipelines.options import Option

AUTO = "auto"  # of a choice that need not be made


def control(option: Option, prefix: str = "") -> Any:
    """The component for an option, inside a gr.Blocks. prefix: of its element id."""
    help_text = option.help
    if not option.choices and option.kind != "flag" and option.shown_default:
        help_text = f"{help_text} Empty: {option.shown_default}."
    about: dict[str, Any] = {
        "label": option.name.replace("_", " ").capitalize(),
        "info": help_text,
        "elem_id": f"{prefix}{option.name.replace('_', '-')}",
    }
    if option.choices:
        automatic = [AUTO] if option.default is None else []
        return gr.Radio([*automatic, *option.choices], value=option.default or AUTO, **about)
    if option.kind == "flag":
        return gr.Checkbox(bool(option.default), **about)
    if option.kind == "whole" and option.default is not None:
        return gr.Number(option.default, **about)
    return gr.Textbox("", **about)  # a number field that is empty from the start sends 0


def given_values(options: Mapping[str, Option], said: Mapping[str, Any]) -> dict[str, Any]:
    """What controls say, by the options' names; what says nothing is left out. Raises ConfigError.

    Values come from a browser, or from whoever talks to the server without one.
    """
    given: dict[str, Any] = {}
    for name, option in options.items():
        value = said.get(name)
        text = "" if value is None else str(value).strip()
        if text in ("", AUTO):
            continue
        if option.kind == "flag" and isinstance(value, bool):
            given[name] = value
            continue
        if option.kind == "whole" and isinstance(value, float) and value.is_integer():
            text = str(int(value))
        given[name] = option.parse(text, text=True)
    return given


def said_values(options: Mapping[str, Option], settings: Any) -> dict[str, Any]:
    """What the controls should say for the values of a settings object, by the options' names."""
    said: dict[str, Any] = {}
    for name, option in options.items():
        value = getattr(settings, option.field)
        if option.choices:
            said[name] = value or AUTO
        elif option.kind == "flag" or (option.kind == "whole" and value is not None):
            said[name] = value
        elif option.kind == "size" and value is not None:
            said[name] = f"{value[0]}x{value[1]}"
        else:
            said[name] = "" if value is None else str(value)
    return said
