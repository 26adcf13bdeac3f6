"""The page of supported models, generated from the code: python -m examples.list_models > docs/models.md"""

from __future__ import annotations

import inspect
import re

import diffusers

from tilewise.pipelines.conditioning.roles import needed_roles, roles_of
from tilewise.pipelines.latent_spaces.base import latent_spaces
from tilewise.plugins.models.common.registry import family_named, supported_models

HEAD = """# Supported models

`tilewise.patch` supports these diffusers denoisers, in a pipeline or alone; `tilewise.supported_models()` returns this list. Each
class passes the same checks on a tiny model with random weights: a full window equals stock attention, a real window equals stock
attention with that window as an explicit mask, and `unpatch` is exact and leaves no trace. `patch` refuses other denoisers,
leaves them unchanged, and lists these. To add one, see [extending](extending.md#add-a-model-family).

| family | denoisers | notes |
| --- | --- | --- |
"""

HIGHRES = """
## Past the training size

`tilewise.highres` and `--highres` ([high resolution](high-resolution.md)) serve these pipelines, from text and from the files
named; those in bold cannot be left out. Each stage fits and encodes the files at its own size. Other pipelines are refused,
except those of the UNets of SD 1.5, SD 2.1 and SDXL, whose pictures are made in one stage.

| pipeline | family | files |
| --- | --- | --- |
"""


def page() -> str:
    """docs/models.md: one row per family, with the first paragraph of its docstring, and one per pipeline of highres."""
    rows = []
    for name, classes in supported_models().items():
        family = type(family_named(name))
        text = family.__doc__ or inspect.getdoc(inspect.getmodule(family)) or ""
        note = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
        rows.append(f"| {name} | {', '.join(f'`{c}`' for c in classes)} | {note} |\n")
    return HEAD + "".join(rows) + HIGHRES + "".join(sorted(map(highres_row, latent_spaces())))


def highres_row(name: str) -> str:
    """A pipeline, the family of the denoiser that its constructor names, and the files that both stages take."""
    kind = getattr(diffusers, name)
    denoiser = str(inspect.signature(kind.__init__).parameters["transformer"].annotation)
    family = next(
        family
        for family, classes in supported_models().items()
        if any(re.search(rf"\b{one}\b", denoiser) for one in classes)
    )
    pipe = object.__new__(kind)  # its class alone says what its call takes
    unserved, needed = latent_spaces()[name].unserved, needed_roles(pipe)
    files = [f"**{role}**" if role in needed else role for role in roles_of(pipe) if role not in unserved]
    return f"| `{name}` | {family} | {', '.join(files) or '–'} |\n"


if __name__ == "__main__":
    print(page(), end="")
