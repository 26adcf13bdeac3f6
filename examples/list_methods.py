"""The page of methods from the literature, generated from the code: python -m examples.list_methods > docs/published-methods.md

A method's section is its module's docstring, which has the formula and what differs from the paper, and the options of its class.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from tilewise.plugins.methods.base import Method, about_methods, make_method, method_class
from tilewise.plugins.methods.option_text import format_value

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
HEAD = """# Methods from the literature

Rules that papers propose for choosing what to attend to, one file each in `plugins/methods/published/`, on the same kernel,
with the same schedule and the same summary rows as `draft`. So they can be compared at equal kept pairs, and tried on your clips:

```
tilewise methods
tilewise generate "a red circle moving right" --method sol --density 0.2
```

With `compensate=False` (`--set compensate=false`) what is not kept is left out, as in most of the papers. The options that
several of them share are those of [`draft`](methods.md): `tile`, `always`, `within`, `refresh`, `drift`, `probe`, `min_tokens`.

`python -m benchmarks.quality --table` makes clips of the bundled model with each at densities of 0.05 to 0.5, without and with
summary rows, between the best blocks that there are and random ones; `python -m benchmarks --only dynamic` times them on a GPU.

The pictures show one query (red) of a clip of the bundled model at density 0.2 and what it sees (blue), in one head above and in
another below; each column is a latent frame ([examples/draw_published_methods.py](../examples/draw_published_methods.py)).

In the formulas i and j are blocks of queries and of keys, q̄ and k̄ the means of their queries and keys, and `scale` is that of the
attention.

"""
ARGUMENT = re.compile(r"^    (\w[\w, ]*): (.*?)(?=^    \w[\w, ]*: |\Z)", re.DOTALL | re.MULTILINE)


def page() -> str:
    """docs/published-methods.md."""
    published = [one for one in about_methods() if ".published." in method_class(one.name).__module__]
    rows = [
        f"| [`{one.name}`](#{one.name}) | {_cell(one.what)} | {_cell(one.source)} | {_cell(one.use)} |\n"
        for one in published
    ]
    table = "| method | what it does | source | for |\n| --- | --- | --- | --- |\n" + "".join(rows)
    streamed = [f"`{one.name}`" for one in published if make_method(one.name).refuses_window() is None]
    streams = f"\nOver the KV cache of a [stream](streaming.md) run {', '.join(streamed[:-1])} and {streamed[-1]}.\n"
    return HEAD + table + streams + "".join(_section(one.name, method_class(one.name)) for one in published)


def _section(name: str, cls: type[Method]) -> str:
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    text = text.replace(f"``{name}``: ", "", 1).replace("``", "`")
    text = text[0].upper() + text[1:]
    picture = f"![{name}](images/method-{name}.png)\n\n" if (IMAGES / f"method-{name}.png").exists() else ""
    return f"\n## `{name}`\n\n{picture}{text}\n{_options(cls)}"


def _options(cls: type[Method]) -> str:
    """A table of the options that the method does not share with others; "" if there are none."""
    told = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    rows = []
    for found in ARGUMENT.finditer(told):
        meaning = " ".join(found[2].split()).replace("``", "`")
        rows += [f"| `{one}` | {format_value(defaults[one])} | {_cell(meaning)} |\n" for one in found[1].split(", ")]
    return "\n| option | default | meaning |\n| --- | --- | --- |\n" + "".join(rows) if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
