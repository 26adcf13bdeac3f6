"""Cases of more ranks than the other modules have, for ``forked_ranks.py``: every family, and every method on Wan, with 12 heads,
which 8 does not divide. How many ranks: the environment variable TILEWISE_RANKS, such as "4,8"."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import family_cases_split
import torch
import wan_cases

import tilewise
from tilewise.plugins.methods.base import Method, make_method, method_class
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.published.delta import Delta
from tilewise.plugins.methods.sta import STA

HEADS = 12
RANKS = tuple(int(number) for number in os.environ.get("TILEWISE_RANKS", "").split(",") if number)
OPTIONS: dict[str, dict[str, Any]] = {
    "sta": {"window": (3, 1, 3), "tile": (2, 3, 4)},
    "neighborhood": {"window": (3, 3, 5)},
    "inward": {"native": (4, 4)},
    "xattention": {**wan_cases.SELECTING, "stride": 4},
}
SHORT_TEXT = (
    "Flux",
    "Flux.2",
    "Qwen-Image",
    "CogVideoX",
    "ConsisID",
    "Chroma",
    "SD 3",
    "SD 3.5",
)  # of 7 tokens, split by itself
OF_UNETS = ("shifted-windows",)
ALL_HEADS = ("duo", "less-is-more", "sol")  # which choose by all heads: dense where ranks share them, and counted
# At a density of 0.5 two scores of EasyAnimate are equal but for rounding.
FAMILY_METHODS = {**family_cases_split.METHODS, "draft": Draft(density=0.6, tile=(1, 3, 4), min_tokens=0)}


def small(name: str) -> Method:
    """A method by its name, with options for a small grid."""
    known = {field.name for field in dataclasses.fields(method_class(name))}  # type: ignore[arg-type]
    usual = {key: value for key, value in wan_cases.SELECTING.items() if key in known}
    return make_method(name, OPTIONS.get(name, usual))


def methods() -> dict[str, Any]:
    return {
        **{name: small(name) for name in tilewise.methods() if name not in (*OF_UNETS, "delta")},
        "delta": Delta(base=small("draft"), every=8),
        "sta, a window a head": STA(window=wan_cases.WINDOWS * 3, tile=(2, 3, 4)),
        "draft, a recall": make_method("draft", {"recall": 0.8, "tile": (1, 4, 4), "min_tokens": 0}),
        "draft, a density a head": make_method(
            "draft", {"head_density": (0.2, 0.4, 0.6, 0.9) * 3, "tile": (1, 4, 4), "min_tokens": 0}
        ),
    }


def with_longer_text(make: family_cases_split.Make, times: int = 3) -> family_cases_split.Make:
    """Of text that is a tensor of its own each rank needs a token."""

    def longer() -> tuple[Any, dict[str, Any]]:
        model, given = make()
        text = given["encoder_hidden_states"]
        given = {**given, "encoder_hidden_states": text.repeat(1, times, 1)}
        if (ids := given.get("txt_ids")) is not None:
            given["txt_ids"] = ids.repeat(*[1] * (ids.ndim - 2), times, 1)
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = torch.cat([mask[:, : text.shape[1]]] * (times - 1) + [mask], 1)
        return model, given

    return longer


def cases() -> dict[str, Callable[..., Any]]:
    found: dict[str, Any] = {}
    for name, method in methods().items():
        found[f"Wan: {name}"] = functools.partial(wan_cases.unequal_heads, method=method, heads=HEADS, strict=False)
    usual, sixteen = family_cases_split.families(HEADS), family_cases_split.families(16)
    for family in (name for name in usual if ", " not in name):
        # diffusers' attention between sound and video pads heads, and refuses 12 on 8 ranks
        make = (sixteen if family == "LTX-2" else usual)[family]
        if family in SHORT_TEXT:
            make = with_longer_text(make)
        for name, method in FAMILY_METHODS.items():
            found[f"{family}: {name}"] = functools.partial(family_cases_split.forward, make=make, method=method)
    for run in found.values():
        run.ranks = RANKS
    return found
