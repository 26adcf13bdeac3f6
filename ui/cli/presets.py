"""`tilewise presets`: the presets, and what every method can be given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from rich.table import Table

from tilewise.plugins.additions.base import additions, additions_text, all_additions
from tilewise.plugins.config import SHARED_OPTIONS, Config, presets, resolve
from tilewise.plugins.methods.base import methods
from tilewise.plugins.methods.option_text import format_value, kind_words, option_types
from tilewise.plugins.presets import PRESETS
from tilewise.plugins.step_caches.options import CACHES
from tilewise.ui.common.terminal import say, standard_output


def presets_command(*, as_json: bool) -> None:
    """Prints the presets as tables or JSON."""
    if as_json:
        print(json.dumps({name: config.to_dict() for name, config in presets().items()}, indent=2))
        return
    out = standard_output()
    table = Table("preset", "method", "schedule", title="--method PRESET", title_justify="left")
    for name, preset in PRESETS.items():
        options = [f"{key}={format_value(value)}" for key, value in preset["method"].items() if key != "name"]
        schedule = f"steps {format_value(preset['steps'])}, blocks {preset['blocks']}"
        schedule += f", with {additions_text(additions(preset['add']))}" if "add" in preset else ""
        table.add_row(name, " ".join([preset["method"]["name"], *options]), schedule)
    out.print(table)
    table = Table(
        "method", "option", "value", "default", title="--method METHOD --set OPTION=VALUE", title_justify="left"
    )
    for name in methods():
        config = resolve(name)
        defaults = {field.name: field.default for field in dataclasses.fields(config.method)}
        rows = [
            (option, kind_words(kind), defaults[option]) for option, kind in option_types(type(config.method)).items()
        ]
        for number, (option, kind, default) in enumerate(rows or [("none: attention is dense", "", "")]):
            shown = format_value(default) if default != "" else ""
            table.add_row("" if number else name, option, kind, shown, end_section=number == len(rows) - 1 or not rows)
    for number, (option, kind) in enumerate(SHARED_OPTIONS.items()):
        table.add_row("" if number else "all but dense", option, kind_words(kind), format_value(_default(option)))
    out.print(table)
    out.print(_named("cache", CACHES))
    out.print(_named("add", all_additions()))
    say(
        "--density, --window, --blocks and --steps-sparse are options of their own; where a default is none, see docs/methods.md"
    )


def _named(flag: str, classes: Mapping[str, type]) -> Table:
    """Step caches, or additions, with their options."""
    title = f"--{flag} {flag.upper()}:OPTION=VALUE"
    table = Table(flag, "option", "value", "default", title=title, title_justify="left")
    for name, cls in classes.items():
        fields, kinds = dataclasses.fields(cls), option_types(cls)
        for number, field in enumerate(fields):
            row = ("" if number else name, field.name, kind_words(kinds[field.name]), format_value(field.default))
            table.add_row(*row, end_section=number == len(fields) - 1)
    return table


def _default(option: str) -> object:
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    return fields["steps" if option == "steps_sparse" else option]
