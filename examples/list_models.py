"""The page of supported models, made from the code: python -m examples.list_models > docs/models.md"""

from __future__ import annotations

import inspect

from tilewise.plugins.models.common.registry import family_named, supported_models

HEAD = """# Supported models

`tilewise.patch` serves these diffusers denoisers, in pipelines or alone; `tilewise.supported_models()` is this list in code.
Each passes the same checks on a tiny random-weight model: a window that holds everything gives stock's output, a real window
gives what stock gives with that window as an explicit mask, and `unpatch` is exact and leaves no trace. Other denoisers are
refused, untouched, with the names of these; how to add one: [CONTRIBUTING.md](../CONTRIBUTING.md).

| family | denoisers | notes |
| --- | --- | --- |
"""


def page() -> str:
    """docs/models.md: a row a family, with the first paragraph of its module."""
    rows = []
    for name, classes in supported_models().items():
        family = type(family_named(name))
        text = family.__doc__ or inspect.getdoc(inspect.getmodule(family)) or ""
        note = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
        rows.append(f"| {name} | {', '.join(f'`{c}`' for c in classes)} | {note} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
