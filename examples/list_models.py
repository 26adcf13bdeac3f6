"""The page of supported models, generated from the code: python -m examples.list_models > docs/models.md"""

from __future__ import annotations

import inspect

from tilewise.plugins.models.common.registry import family_named, supported_models

HEAD = """# Supported models

`tilewise.patch` supports these diffusers denoisers, in a pipeline or alone; `tilewise.supported_models()` returns this list. Each
class passes the same checks on a tiny model with random weights: a full window equals stock attention, a real window equals stock
attention with that window as an explicit mask, and `unpatch` is exact and leaves no trace. `patch` refuses other denoisers,
leaves them unchanged, and lists these. To add one, see [extending](extending.md#add-a-model-family).

| family | denoisers | notes |
| --- | --- | --- |
"""


def page() -> str:
    """docs/models.md: one row per family, with the first paragraph of its docstring."""
    rows = []
    for name, classes in supported_models().items():
        family = type(family_named(name))
        text = family.__doc__ or inspect.getdoc(inspect.getmodule(family)) or ""
        note = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
        rows.append(f"| {name} | {', '.join(f'`{c}`' for c in classes)} | {note} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
