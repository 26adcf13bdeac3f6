"""Options of the attention method in a request: the common ones by name, every other one as "set.NAME".

`--set recall=0.9` on the command line, the column "set.recall" of a batch and `--sweep set.recall=0.8,0.9` say the same. The
prefix keeps them apart from other options: `refresh` is one of clips of two stages, and also one of the method draft. Nothing
here imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilewise.pipelines.options import Option
from tilewise.plugins.errors import ConfigError

PREFIX = "set."
METHOD_OPTIONS = {
    one.name: one
    for one in (
        Option(
            "window",
            "numbers",
            "Window of the method, t,h,w; of sta in tiles, such as 3,3,3; of --stream, latent frames.",
        ),
        Option("density", "number", "Fraction of token pairs that the method keeps, in (0, 1]."),
        Option(
            "steps_sparse",
            "numbers",
            "FROM,TO: part of the denoising steps that runs the method, such as 0.25,1, or steps by number, such as 1:.",
            shown_default="the method's",
        ),
        Option(
            "blocks",
            "text",
            "Transformer blocks that run the method, such as 1: or 0,3:9; the others are dense.",
            shown_default="the method's",
        ),
        Option(
            "cache",
            "method",
            "Step cache of diffusers: first-block, taylor, mag, sea or pab; options as in first-block:threshold=0.1.",
            shown_default="none",
        ),
        Option(
            "add",
            "method",
            "What else is put on the model, such as raunet, or broadway:alpha=0.6 (tilewise presets lists all); joined by +.",
            shown_default="none",
        ),
    )
}
"""The options of methods that have names of their own."""
SET = Option("set", "texts", "NAME=VALUE: any other option of the method, recall=0.9 for instance. Repeatable.")
EITHER = ("window", "density", f"{PREFIX}recall")
"""Options that say how much is kept: whoever gives one replaces the others."""


def is_method_option(name: str) -> bool:
    return name in METHOD_OPTIONS or name.startswith(PREFIX)


def method_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields of a request those that change the method, by the method's names."""
    return {name.removeprefix(PREFIX): value for name, value in fields.items() if is_method_option(name)}


def field_name(name: str) -> str:
    """The field of a request that sets a method's option: "recall" → "set.recall", "density" → "density"."""
    name = name.strip().replace("-", "_")
    return name if name in METHOD_OPTIONS else PREFIX + name


def flag(field: str) -> str:
    """How the command line calls a field of a request."""
    return f"--set {field.removeprefix(PREFIX)}=…" if field.startswith(PREFIX) else f"--{field.replace('_', '-')}"


def parse_set(texts: Sequence[str]) -> dict[str, str]:
    """Fields of a request from "recall=0.9" and the like. Raises ConfigError for other texts, and a name given twice."""
    fields: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set takes NAME=VALUE, such as recall=0.9, not {text[:80]!r}")
        field = field_name(name)
        if field in fields:
            raise ConfigError(f"--set {name.strip()} is given twice")
        fields[field] = value.strip()
    return fields
