"""`tilewise methods`: every method in one line, with its source and what it is for."""

from __future__ import annotations

import json

from rich.table import Table

from tilewise.plugins.methods.base import about_methods
from tilewise.ui.common.terminal import say, standard_output


def methods_command(*, as_json: bool) -> None:
    """Prints the methods as a table or JSON."""
    about = about_methods()
    if as_json:
        print(
            json.dumps({one.name: {"what": one.what, "source": one.source, "use": one.use} for one in about}, indent=2)
        )
        return
    table = Table(
        "method", "what it does", "source", "for", title="--method METHOD", title_justify="left", show_lines=True
    )
    for one in about:
        table.add_row(one.name, one.what, one.source, one.use)
    standard_output().print(table)
    say("`tilewise presets` lists their options; docs/methods.md describes them")
