"""Options of methods as text, for command lines and tables: read by the type of the dataclass field, and written."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from tilewise.plugins.errors import ConfigError, unknown

NONE = "none"
_FLAGS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


def option_types(cls: type) -> dict[str, Any]:
    """Name → type of each option of a method (or of any dataclass), as its annotation says; first what says how much is kept."""
    hints = typing.get_type_hints(cls)
    first = [name for group in getattr(cls, "exclusive", ()) for name in group]
    names = [*first, *(field.name for field in dataclasses.fields(cls))]
    return {name: hints[name] for name in dict.fromkeys(names)}


def parse_value(what: str, text: str, kind: Any) -> Any:
    """A value of a type from text: "0.5", "true", "none", "3,3,3", "3,3,3;1,5,5", JSON for lists and objects.

    Raises:
        ConfigError: saying what is wanted. what: how messages call the value.
    """
    for member in _members(kind):
        try:
            return _parse(text.strip(), member)
        except ValueError:
            continue
    raise ConfigError(f"{what} must be {kind_words(kind)}, not {text[:80]!r}")


def format_value(value: Any) -> str:
    """The text that `parse_value` reads as this value."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(item, Sequence) and not isinstance(item, str) for item in value)
        return (";" if nested else ",").join(map(format_value, value))
    return str(value)


def kind_words(kind: Any) -> str:
    """A type in words, for messages and tables."""
    return " or ".join(dict.fromkeys(_words(member) for member in _members(kind)))


def read_named(what: str, text: str, example: str) -> dict[str, Any]:
    """``{"name": …, option: text, …}`` from "name:option=value:option=value", or from a JSON object.

    what: how messages call it. example: of such a text.

    Raises:
        ConfigError: for other text, or an option that is given twice.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            found: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{what}: {text[:80]!r} is not JSON: {error}") from error
        return found
    name, *options = text.split(":")
    read: dict[str, Any] = {"name": name.strip()}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(
                f"{what} {name}: options are written NAME:OPTION=VALUE, such as {example}, not {text[:80]!r}"
            )
        if key in read:
            raise ConfigError(f"{what} {name}: {key} is given twice")
        read[key] = value.strip()
    return read


def make_named(what: str, value: Any, classes: Mapping[str, type]) -> Any:
    """A dataclass of ``classes`` from an object with ``name`` and options, whose text is read by the field's type.

    Raises:
        ConfigError: unknown name or option, with those that there are, or a value that cannot be.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{what} must be one of {', '.join(classes)}, or an object with name and options, got {str(value)[:80]!r}"
        )
    options = {key: given for key, given in value.items() if key != "name"}
    cls = classes.get(value["name"])
    if cls is None:
        raise unknown(what, value["name"], [*classes, NONE])
    kinds = option_types(cls)
    for option, given in options.items():
        if option not in kinds:
            raise unknown(f"option of {what} {value['name']!r}:", option, kinds)
        if isinstance(given, str) and kinds[option] is not str:
            options[option] = parse_value(f"{option} of {what} {value['name']}", given, kinds[option])
    return cls(**options)


def named_text(value: Any) -> str:
    """The text that `read_named` reads: the name, and the options of a dataclass that are not their defaults."""
    changed = [field for field in dataclasses.fields(value) if getattr(value, field.name) != field.default]
    return ":".join([value.name, *(f"{field.name}={format_value(getattr(value, field.name))}" for field in changed)])


def named_dict(value: Any) -> dict[str, Any]:
    """JSON values of a dataclass with a ``name``; `make_named` reads them."""
    values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {"name": value.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


def _members(kind: Any) -> list[Any]:
    """The types of a union, None last as it is the least likely to be wanted; of another type, itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return sorted(typing.get_args(kind), key=lambda member: member is types.NoneType)
    return [kind]


def _parse(text: str, kind: Any) -> Any:
    """Raises ValueError for text that is not of this type, which is no union."""
    if kind is types.NoneType:
        if text.lower() in (NONE, "null"):
            return None
        raise ValueError(text)
    if kind is bool:
        if text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        raise ValueError(text)
    if kind in (int, float):
        if "_" in text:  # Python's digit groups are a typing error here
            raise ValueError(text)
        return kind(text)
    if kind is str:
        if text.lower() in (NONE, "null"):
            raise ValueError(text)
        return text
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(text, typing.get_args(kind))
    return _parse_method(text)


def _parse_tuple(text: str, members: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = len(members) == 2 and members[1] is Ellipsis
    nested = typing.get_origin(members[0]) is tuple
    if text.startswith("["):
        items = [json.dumps(item) if isinstance(item, list) else str(item) for item in json.loads(text)]
    else:
        items = [item.strip() for item in text.split(";" if nested else ",")] if text else []
    if nested and len(items) < 2:
        raise ValueError(text)  # one window is no list of windows
    kinds = members[:1] * len(items) if repeated else members
    if len(kinds) != len(items):
        raise ValueError(text)
    return tuple(_parse(item, kind) for item, kind in zip(items, kinds, strict=True))


def _parse_method(text: str) -> Any:
    """A method within a method: its name, or a JSON object with "name" and options."""
    if text.lower() in (NONE, "null", ""):
        return None
    if not text.startswith("{"):
        return {"name": text}
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(text) from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(text)
    return value


def _words(kind: Any) -> str:
    plain = {types.NoneType: NONE, bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
    if kind in plain:
        return plain[kind]
    if typing.get_origin(kind) is not tuple:
        return 'a method, or {"name": …}'
    members = typing.get_args(kind)
    if members[1:] == (Ellipsis,):
        if members[0] in (int, float):
            return "numbers such as 1,0.98"
        return "several of these, separated by ;" if typing.get_origin(members[0]) is tuple else "names such as a,b"
    what, example = {
        int: ("whole numbers", "3,3,3"),
        float: ("numbers", "0.25,1,1"),
        bool: ("of true and false", "true,false,false"),
    }[members[0]]
    return f"{('one', 'two', 'three')[len(members) - 1]} {what} such as {','.join(example.split(',')[: len(members)])}"
