"""Options, each declared once: on the field of the settings dataclass that it sets, with its help text and valid values.

The command line, a batch's columns and the page's controls are made from these declarations (`options_of`), so a new option is a
new field. Nothing here needs PyTorch: ``tilewise --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from tilewise.plugins.errors import ConfigError, unknown

KINDS = {
    "text": "text",
    "texts": "text, or a list of texts",
    "whole": "a whole number",
    "number": "a number",
    "flag": "true or false",
    "size": "a height and width such as 480x832",
    "numbers": "numbers such as 3,3,3 or [3, 3, 3]",
    "method": "a name or a config object",
}
"""Kinds of values, as messages call them."""

_KIND_OF_TYPE = {"str": "text", "int": "whole", "float": "number", "bool": "flag", "tuple[int, int]": "size"}
_KIND_OF_TYPE["tuple[str, ...]"] = "texts"  # an option that may be repeated
_METADATA = "tilewise option"


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of the command line, a column of a batch, a control of the page.

    name: as users write it, with underscores. kind: one of KINDS. help: a phrase that says what it sets. choices: the valid
    values, if they can be listed. default: of the field; None where there is none. shown_default: what help texts say instead.
    field: name of the field that it sets. optional: whether that may be None. names_file: it names a file of this machine,
    which visitors of the page must not do: the command line and batches alone have it.
    """

    name: str
    kind: str
    help: str
    choices: tuple[str, ...] = ()
    default: Any = None
    shown_default: str | None = None
    field: str = ""
    optional: bool = False
    names_file: bool = False

    @property
    def default_text(self) -> str | None:
        """The default in words, for help texts; None where nothing is to be said."""
        if self.shown_default is not None or self.default is None:
            return self.shown_default
        return {True: "on", False: "off"}[self.default] if isinstance(self.default, bool) else str(self.default)

    def parse(self, value: Any, *, text: bool) -> Any:
        """A value in the option's own type; with `text`, from words as in a table's cell. Raises ConfigError."""
        said = value if isinstance(value, str) else json.dumps(value)
        if text and self.kind in ("whole", "number"):
            value = _number(value)
        if text and self.kind == "flag":
            value = {"true": True, "false": False}.get(value.lower(), value)
        is_text, is_bool = isinstance(value, str), isinstance(value, bool)
        valid = {
            "text": is_text,
            "texts": is_text or (isinstance(value, list) and all(isinstance(one, str) for one in value)),
            "whole": isinstance(value, int) and not is_bool,
            "number": isinstance(value, int | float) and not is_bool,
            "flag": is_bool,
            "size": is_text,
            "method": isinstance(value, str | Mapping),
            "numbers": is_text or _are_numbers(value if isinstance(value, list) else [value]),
        }[self.kind]
        if not valid:
            raise ConfigError(f"{self.name} must be {KINDS[self.kind]}, not {said[:80]!r}")
        if self.kind == "texts":
            return value if isinstance(value, list) else [part.strip() for part in value.split(";")]
        if self.kind == "numbers" and not is_text:
            return _joined(value if isinstance(value, list) else [value])
        return value


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    name: str | None = None,
    kind: str | None = None,
    choices: tuple[str, ...] = (),
    shown_default: str | None = None,
    names_file: bool = False,
) -> Any:
    """A dataclass field that users can set; see `Option`. kind: default: that of the field's annotation. name: default: the
    field's."""
    told: dict[str, Any] = {"name": name, "kind": kind, "help": help, "choices": choices}
    told |= {"shown_default": shown_default, "names_file": names_file}
    return dataclasses.field(default=default, metadata={_METADATA: told})


def options_of(settings: Any) -> dict[str, Option]:
    """The options of a settings dataclass by name, in the order of its fields.

    Raises:
        TypeError: for a field without a declaration, which users could not reach.
    """
    found: dict[str, Option] = {}
    for field in dataclasses.fields(settings):
        if _METADATA not in field.metadata:
            raise TypeError(f"{settings.__name__}.{field.name} declares no option: write it as `= option(help=...)`")
        told = dict(field.metadata[_METADATA])
        name = told.pop("name") or field.name
        kind = told.pop("kind") or _KIND_OF_TYPE[str(field.type).removesuffix(" | None")]
        optional = str(field.type).endswith(" | None")
        default = None if field.default is dataclasses.MISSING else field.default
        found[name] = Option(name=name, kind=kind, default=default, field=field.name, optional=optional, **told)
    return found


def field_values(settings: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a settings dataclass from options by name, as `Option.parse` gives them; others are left out."""
    options = options_of(settings)
    return {
        one.field: parse_size(given[name], name) if one.kind == "size" and isinstance(given[name], str) else given[name]
        for name, one in options.items()
        if given.get(name) is not None
    }


def check_choices(settings: Any) -> None:
    """Raises ConfigError for a field of a settings object whose value is none of its option's choices."""
    for one in options_of(type(settings)).values():
        value = getattr(settings, one.field)
        if one.choices and not (value is None and one.default is None) and value not in one.choices:
            raise unknown(one.name.replace("_", " "), value, one.choices)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 10**300 if isinstance(value, int) else math.isfinite(value)


def parse_size(text: str, name: str = "native") -> tuple[int, int]:
    """(height, width) from "480x832". Raises ConfigError, which calls the option `name`."""
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*x\s*([0-9]{1,9})\s*", text.lower())
    if found is None:
        raise ConfigError(f"--{name.replace('_', '-')} takes a height and width such as 480x832, not {text[:80]!r}")
    return int(found[1]), int(found[2])


def _are_numbers(value: Any) -> bool:
    """Whether a JSON value is a list of numbers, or a list of such lists."""
    if not isinstance(value, list) or not value:
        return False
    return all(type(n) in (int, float) for n in value) or all(isinstance(n, list) and _are_numbers(n) for n in value)


def _joined(values: list[Any]) -> str:
    """A list as the text that stands for it: "3,3,3", and lists of lists "3,3,3;1,5,5"."""
    nested = any(isinstance(value, list) for value in values)
    return (";" if nested else ",").join(_joined(value) if isinstance(value, list) else str(value) for value in values)


def _number(text: str) -> Any:
    """An int or float from words, or the words themselves if they are none: the caller says what was wanted."""
    if re.fullmatch(r"[+-]?\d{1,30}", text):
        return int(text)
    try:
        return float(text) if "_" not in text else text
    except ValueError:
        return text
