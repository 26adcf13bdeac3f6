"""Settings of the second stage of a high-resolution clip."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilewise.pipelines.generation.settings import CLIP_OPTIONS, MODELS_OWN
from tilewise.pipelines.memory.units import parse_bytes
from tilewise.pipelines.options import Option, check_choices, option, options_of
from tilewise.plugins.errors import ConfigError, unknown

if TYPE_CHECKING:
    from tilewise.pipelines.loading.model_defaults import ModelDefaults

PATHS = ("dense", "draft", "pooled", "none")
GUIDED = ("all", "cond")
UPSCALES = ("bicubic", "bilinear", "lanczos", "latent")
# What `scaled_rope` and `Config` take. Named here too, since importing those needs PyTorch; a test holds them together.
ROPE = ("ntk", "yarn")
ROPE_TIME = ("riflex", *ROPE)
PRECISIONS = ("int8", "fp8")
FAR = ("cells", "tiles")


@dataclasses.dataclass(frozen=True)
class HighresSettings:
    """The second stage. Defaults are the paper's (FreeSwim, arXiv 2511.14712), where it has them; of its k = 2 to 5 steps between
    two refreshes the longest, and as in its cached code those of the prompt's forward: on the demo model neither costs anything
    that the object counts and the sharpness would show (docs/high-resolution.md).

    Args:
        strength: share of the steps that run at the target, from the upscaled clip noised accordingly, in (0, 1]; None: what the
            model says (`ModelDefaults`), 0.7 where it says nothing.
        refresh: the full path runs every so many steps; 1: at each.
        global_path: how the full path attends to itself: "dense"; "draft": to the quarter of all tokens that a draft of its
            attention map asks for; "pooled": to the means of 2×2 tokens. "none": the window path alone. None: "dense" where the
            denoiser has cross-attention to its text; "none" where text is part of the sequence, which may have "dense" too.
        guided: whether the full path guides "all" forwards, or those of the prompt and not the negative prompt ("cond").
        upscale: "bicubic", "bilinear" or "lanczos" on frames, or "latent".
        flow_shift: of the target's noise schedule; None: the scheduler's own; "model": what the model says, for Wan 9 where it
            says nothing, for other models the scheduler's own.
        temperature: whether the window's attention is sharpened by the paper's scale.
        window: native height and width in pixels that the window stands for; None: the native stage's.
        far: "cells" or "tiles": means of small cells, or one a tile, stand for what the window leaves out; None: nothing does.
        rope: "ntk" or "yarn" for height and width; None: unchanged. rope_time: "riflex", "ntk" or "yarn".
        precision: "int8" or "fp8": the target's attention with 8-bit products, see ``Config``; a full path that
            is dense or pooled stays in the model's 16 bits. None: all of it.
        max_memory: bytes on the device, or text such as "24GB"; None: what is free.

    Raises:
        ConfigError: for a value that cannot be.
    """

    strength: float | None = option(
        None, help="Fraction of the steps that run at the target size, in (0, 1].", shown_default=MODELS_OWN
    )
    refresh: int = option(5, help="Run the full path every N steps.")
    global_path: str | None = option(
        None, help="What guides the window attention.", choices=PATHS, shown_default="what suits the model"
    )
    guided: str = option(
        "cond", help="Which forwards the full path guides: all, or cond (only those of the prompt).", choices=GUIDED
    )
    upscale: str = option("bicubic", help="How the clip of the first stage is upscaled.", choices=UPSCALES)
    flow_shift: float | str | None = option(
        "model", kind="number", help="Flow shift of the second stage's noise schedule.", shown_default=MODELS_OWN
    )
    temperature: bool = option(True, help="Sharpen the window's attention by FreeSwim's scale.")
    window: tuple[int, int] | None = option(
        None,
        name="highres_window",
        help="Size that the window covers, HxW in pixels.",
        shown_default="the first stage's",
    )
    far: str | None = option(
        None,
        name="highres_far",
        help="Means that stand for what the window leaves out.",
        choices=FAR,
        shown_default="none",
    )
    rope: str | None = option(
        None, help="Rotary scaling of height and width (Wan).", choices=ROPE, shown_default="unchanged"
    )
    rope_time: str | None = option(
        None, help="Rotary scaling of time (Wan).", choices=ROPE_TIME, shown_default="unchanged"
    )
    precision: str | None = option(
        None, help="8-bit attention in the second stage.", choices=PRECISIONS,
        shown_default="the model's 16 bits",
    )  # fmt: skip
    max_memory: int | None = option(None, kind="text", help="Memory limit, such as 24GB.", shown_default="what is free")

    def __post_init__(self) -> None:
        if self.strength is not None:
            steps_to_run(10**9, self.strength)
        if self.flow_shift not in (None, "model"):
            check_shift(self.flow_shift)
        if not isinstance(self.refresh, int) or isinstance(self.refresh, bool) or self.refresh < 1:
            raise ConfigError(f"refresh must be a whole number of at least 1, not {self.refresh!r}")
        check_choices(self)
        if not isinstance(self.temperature, bool):
            raise ConfigError(f"temperature must be true or false, not {self.temperature!r}")
        if self.window is not None:
            object.__setattr__(self, "window", pixels("window", self.window))
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_bytes(self.max_memory))

    def for_model(self, native: ModelDefaults, paths: tuple[str, ...]) -> HighresSettings:
        """With the model's strength, shift and full path where none were given; paths: those that it can have, the usual first.

        Raises:
            ConfigError: for a full path that the model cannot have.
        """
        path = self.global_path or paths[0]
        if path not in paths:
            raise ConfigError(
                f"global_path={path!r} is not for this model, which has {' or '.join(map(repr, paths))}: what a full path tells "
                "a window is read where the model looks at its text, and that is part of the same attention as the picture here"
            )
        strength = native.highres_strength if self.strength is None else self.strength
        shift = native.highres_flow_shift if self.flow_shift == "model" else self.flow_shift
        return dataclasses.replace(self, strength=strength, flow_shift=shift, global_path=path)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HighresSettings:
        """What `to_dict` wrote. Raises ConfigError for unknown keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown("high-resolution setting", key, names)
        return cls(**values)


def pixels(name: str, value: Any) -> tuple[int, int]:
    """A (height, width) as it was given, which may be a list.

    Raises:
        ConfigError: for anything but two whole numbers of at least 1.
    """
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
        raise ConfigError(f"{name} must be a height and a width in pixels, (480, 832) for instance, not {value!r}")
    return value[0], value[1]


def steps_to_run(steps: int, strength: float) -> int:
    """How many of ``steps`` a strength in (0, 1] leaves.

    Raises:
        ConfigError: for a strength outside that, or one that leaves no step.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ConfigError(f"strength must be in (0, 1], not {strength!r}")
    left = int(steps * strength + 1e-9)
    if left < 1:
        raise ConfigError(f"strength {strength} leaves none of {steps} steps; at least {1 / steps:.3g} is needed")
    return left


def check_shift(flow_shift: Any) -> None:
    """Raises ConfigError for what is no flow shift."""
    number = isinstance(flow_shift, int | float) and not isinstance(flow_shift, bool)
    if not number or not 0 < flow_shift < math.inf:
        raise ConfigError(
            f"flow_shift must be a number above 0, None (the scheduler's own) or 'model', not {flow_shift!r}"
        )


HIGHRES = Option(
    "highres",
    "flag",
    "Past the model's size: generate at its own size first, then at --height and --width from that clip.",
)
TWO_STAGE_OPTIONS = {
    **{name: one for name, one in options_of(HighresSettings).items() if name not in CLIP_OPTIONS},
    "native": Option(
        "native",
        "size",
        "Size of the first stage, HxW in pixels.",
        shown_default="the model's own, in the target's shape",
    ),
}
"""What a request may say of a clip past the training size beside `CLIP_OPTIONS`, whose `strength` is the second stage's here: the
fields of `HighresSettings`, and the first stage's size."""
