"""How a bidirectional model makes a long video: window after window. No torch here: a recipe is numbers and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewise.pipelines.options import is_number
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.text_format import counted

_WHOLE = {"window": 1, "overlap": 0, "steps": 1, "height": 1, "width": 1, "sink": 0, "previous": 0}
_SHARES = ("adain", "prefix_noise")
EARLIER = ("sink", "previous")  # latent frames of earlier windows that later ones attend to


@dataclass(frozen=True)
class WindowRecipe:
    """Windows of a bidirectional model, each of which goes on from the last latents of the one before it.

    way: how; the name of a file in ``pipelines/streaming/windows/ways``.
    window: latent frames that are denoised at once. overlap: how many of them are the last ones of the window before.
    steps, guidance: of the stock pipeline's call. fps: frames a second on playback. height, width: pixels.
    adain: share, 0 … 1, by which mean and standard deviation of each latent channel of a window are brought back to those of the
    first window (AdaIN, arXiv 1703.06868, of latents).
    prefix_noise: noise level, 0 … 1, that the clean frames of ``prefix`` have (SkyReels-V2's long videos: 0.02).
    sink, previous: latent frames whose keys and values each later window attends to beside its own, at the same layer and pass:
    the first ones of the first window, and those of the window before that lie before the overlap (cross-window attention,
    LOVECon, arXiv 2310.09711).

    Raises ConfigError for values that contradict each other.
    """

    way: str
    window: int
    overlap: int
    steps: int
    guidance: float
    fps: float
    height: int
    width: int
    adain: float = 0.0
    prefix_noise: float = 0.0
    sink: int = 0
    previous: int = 0

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"windows: {name} must be a whole number of at least {least}, not {value!r}")
        for name in (*_SHARES, "guidance", "fps"):
            if not is_number(value := getattr(self, name)):
                raise ConfigError(f"windows: {name} must be a number, not {value!r}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"windows: {name} must be from 0 to 1, not {getattr(self, name):g}")
        if self.prefix_noise == 1:
            raise ConfigError("windows: prefix_noise=1 leaves nothing of the window before; 0.02 is usual")
        if self.overlap >= self.window:
            raise ConfigError(
                f"windows: an overlap of {self.overlap} latent frames leaves nothing new in a window of {self.window}; give a "
                f"smaller overlap, at most {self.window - 1}, or a longer window"
            )

        if self.sink > self.window:
            raise ConfigError(
                f"windows: a sink of {self.sink} latent frames is longer than the first window, {self.window}"
            )
        if self.previous > self.chunk:
            raise ConfigError(
                f"windows: previous={self.previous} latent frames before an overlap of {self.overlap} are more than a window of "
                f"{self.window} has; give at most {self.chunk}"
            )

    @property
    def name(self) -> str:
        """What kind of stream this is."""
        return f"windows, {self.way}"

    @property
    def chunk(self) -> int:
        """Latent frames that are new in a window."""
        return self.window - self.overlap

    def replace(self, **changes: Any) -> WindowRecipe:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> WindowRecipe:
        """What ``to_dict`` wrote. Raises ConfigError."""
        valid = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in valid:
                raise unknown("field of a recipe of windows", name, valid)
        missing = [field.name for field in dataclasses.fields(cls)
                   if field.default is dataclasses.MISSING and field.name not in fields]  # fmt: skip
        if missing:
            raise ConfigError(f"a recipe of windows needs {', '.join(missing)}")
        return cls(**fields)

    def __str__(self) -> str:
        guards = [f"{name} {getattr(self, name):g}" for name in (*_SHARES, *EARLIER) if getattr(self, name)]
        rows = [
            ("way", self.way),
            ("window", f"{self.window} latent frames, {self.overlap} of them those of the window before"),
            ("passes", f"{counted(self.steps, 'step')} a window, guidance {self.guidance:g}"),
            ("against drift", ", ".join(guards) or "nothing"),
            ("video", f"{self.height} × {self.width} pixels, {self.fps:g} frames a second"),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(["windows of a bidirectional model", *(f"  {label:<{width}}  {text}" for label, text in rows)])
