"""The options of clips that are made by two stages, as `generate` and `batch` have them. Only typer is imported here."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer


def _option(help: str, default: str | bool = True) -> typer.models.OptionInfo:
    return typer.Option(help=f"--highres: {help}", show_default=default)


Strength: TypeAlias = Annotated[
    float | None, _option("share of the steps that run at the target, in (0, 1].", "the model's own")
]
Refresh: TypeAlias = Annotated[int | None, _option("the full path runs every so many steps.", "5")]
GlobalPath: TypeAlias = Annotated[
    str | None, _option("what guides the window: dense, draft, pooled or none.", "what suits the model")
]
Guided: TypeAlias = Annotated[
    str | None, _option("which forwards the full path guides: all, or cond (the prompt's alone).", "cond")
]
Upscale: TypeAlias = Annotated[str | None, _option("bicubic, bilinear, lanczos or latent.", "bicubic")]
Precision: TypeAlias = Annotated[
    str | None, _option("int8 or fp8 products in the target's attention, on a Hopper GPU.", "the model's 16 bits")
]
FlowShift: TypeAlias = Annotated[float | None, _option("flow shift of the target's noise schedule.", "the model's own")]
Rope: TypeAlias = Annotated[str | None, _option("rotary scaling of height and width, ntk or yarn (Wan).", "unchanged")]
RopeTime: TypeAlias = Annotated[str | None, _option("rotary scaling of time, riflex, ntk or yarn (Wan).", "unchanged")]
Native: TypeAlias = Annotated[
    str | None, _option("size of the first stage, HxW.", "the model's own, in the target's shape")
]
MaxMemory: TypeAlias = Annotated[str | None, _option("memory to stay within, such as 24GB.")]
