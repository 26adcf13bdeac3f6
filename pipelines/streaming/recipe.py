"""How a causal checkpoint makes video: chunk, noise levels, cache. No torch here: a recipe is numbers and names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewise.pipelines.options import is_number
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.streaming.kv_cache import SINK_POSITIONS
from tilewise.plugins.text_format import counted

SOLVERS = ("renoise", "unipc", "euler")
TRAIN_STEPS = 1000.0  # timesteps are counted from 0 (clean) to this (pure noise)

_WHOLE = {"chunk": 1, "first_chunk": 1, "window": 1, "sink": 0, "memory": 0, "fps": 1, "height": 16, "width": 16}
_OPTIONAL = ("first_chunk", "first_timesteps", "boundary")


@dataclass(frozen=True)
class CausalRecipe:
    """How a causal checkpoint makes video, chunk by chunk. Lengths are in latent frames.

    name: which published recipe this is, or any word of your own.
    chunk, first_chunk: latent frames of a chunk, and of the first one (None: as the others).
    timesteps, first_timesteps: of the denoising passes of a chunk, falling, in 0 … 1000, and of the first chunk (None: as
    the others). A last 0 is dropped, as in the published samplers: a pass at noise level 0 changes nothing.
    warp, shift: whether timesteps pass through σ' = s·σ / (1 + (s − 1)·σ), and its s. Where warp is false, they are
    noise levels already.
    context_noise: timestep of the pass over a finished chunk that writes its keys and values; 0 is clean.
    window: latents that a chunk attends to, sink and the chunk itself included. Memory comes on top, as in ``KVCache``.
    sink: latents at the beginning that stay. memory: latents for averages of what was evicted; 0: as many as the policy keeps.
    sink_position: "clamped" (just before the window) or "absolute" (where the sink was made).
    policy: what happens to an evicted chunk; the name of a cache policy.
    solver: "renoise" (x0 = x − σ·v, then fresh noise to the next σ), "unipc" or "euler".
    guidance: classifier-free guidance scale; 1 is a distilled model, with one forward a pass.
    boundary: with two transformers (Wan 2.2 A14B), the first one takes the passes whose σ is at least this, in (0, 1).
    fps: frames a second on playback. height, width: pixels that the checkpoint was trained for.

    Raises ConfigError for values that contradict each other.
    """

    name: str = "self-forcing"
    chunk: int = 3
    first_chunk: int | None = None
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    first_timesteps: tuple[float, ...] | None = None
    warp: bool = True
    shift: float = 5.0
    context_noise: float = 0.0
    window: int = 21
    sink: int = 0
    memory: int = 0
    sink_position: str = "clamped"
    policy: str = "fixed"
    solver: str = "renoise"
    guidance: float = 1.0
    boundary: float | None = None
    fps: int = 16
    height: int = 480
    width: int = 832

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"causal recipe: {name} must be a whole number from {least} on, not {value!r}")
        for name in ("shift", "context_noise", "guidance", "boundary"):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not is_number(value):
                raise ConfigError(f"causal recipe: {name} must be a number, not {value!r}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.warp, bool):
            raise ConfigError(f"causal recipe: warp must be true or false, not {self.warp!r}")
        for name in ("timesteps", "first_timesteps"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _checked_timesteps(name, value))
        self._check_choices()
        self._check_lengths()

    def _check_choices(self) -> None:
        if self.sink_position not in SINK_POSITIONS:
            raise unknown("sink_position", self.sink_position, SINK_POSITIONS)
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        for name in ("name", "policy"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"causal recipe: {name} must be a word, not {getattr(self, name)!r}")
        if self.shift <= 0:
            raise ConfigError(f"causal recipe: shift must be above 0, not {self.shift:g}")
        if not 0 <= self.context_noise < TRAIN_STEPS:
            raise ConfigError(f"causal recipe: context_noise is a timestep in 0 … 999, not {self.context_noise:g}")
        if self.guidance < 1:
            raise ConfigError(f"causal recipe: guidance must be 1 (none) or more, not {self.guidance:g}")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ConfigError(
                f"causal recipe: boundary is a noise level between 0 and 1, not {self.boundary:g}; "
                "a timestep is divided by 1000"
            )

    def _check_lengths(self) -> None:
        largest = max(self.chunk, self.first_chunk or 0)
        if self.window < largest:
            raise ConfigError(
                f"causal recipe: a window of {self.window} latents is shorter than a chunk of {largest}: "
                "the window holds the chunk that is being made; give a longer window or a shorter chunk"
            )
        if self.sink > self.window - largest:
            raise ConfigError(
                f"causal recipe: a sink of {self.sink} latents and a chunk of {largest} do not fit into a window of "
                f"{self.window}; the sink may have {self.window - largest}"
            )

    def sigmas(self, first: bool = False) -> tuple[float, ...]:
        """Noise levels in (0, 1] of the denoising passes, falling, in float64; of the first chunk with ``first``.

        After the last pass the chunk is clean (σ = 0), which is not listed.
        """
        steps = self.first_timesteps if first and self.first_timesteps is not None else self.timesteps
        return tuple(self._sigma(t) for t in steps)

    def context_sigma(self) -> float:
        """Noise level of the pass that writes the cache. It is not warped, in the published samplers either."""
        return self.context_noise / TRAIN_STEPS

    def chunk_length(self, index: int) -> int:
        """Latent frames of the chunk with this number, counted from 0."""
        return self.first_chunk if index == 0 and self.first_chunk is not None else self.chunk

    def _sigma(self, timestep: float) -> float:
        level = timestep / TRAIN_STEPS
        return self.shift * level / (1.0 + (self.shift - 1.0) * level) if self.warp else level

    def replace(self, **changes: Any) -> CausalRecipe:
        """A copy with other values. Raises ConfigError for an unknown field."""
        _check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them: tuples become lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CausalRecipe:
        """The recipe of a JSON object; fields that are missing have their default. Raises ConfigError."""
        _check_fields(fields)
        return cls(**fields)

    def __str__(self) -> str:
        def frames(count: int) -> str:
            return counted(count, "latent frame")

        def levels(first: bool) -> str:
            steps = self.first_timesteps if first and self.first_timesteps is not None else self.timesteps
            given = ", ".join(f"{t:g}" for t in steps)
            return f"{given}  (σ {', '.join(f'{s:.3f}' for s in self.sigmas(first))})"

        first_frames = "" if self.first_chunk in (None, self.chunk) else f", the first {self.first_chunk}"
        kept = f", sink {self.sink} ({self.sink_position})" if self.sink else ""
        kept += f", memory {self.memory}" if self.memory else ""
        rows = [("chunk", frames(self.chunk) + first_frames), ("timesteps", levels(False))]
        if self.first_timesteps is not None:
            rows.append(("first chunk", levels(True)))
        rows += [
            (
                "shift",
                f"{self.shift:g}, {'applied to the timesteps' if self.warp else 'timesteps are shifted already'}",
            ),
            ("solver", self.solver),
            ("window", frames(self.window) + kept + f", policy {self.policy}"),
            ("context noise", f"{self.context_noise:g}"),
            ("guidance", "none (distilled)" if self.guidance == 1 else f"{self.guidance:g}"),
        ]
        if self.boundary is not None:
            rows.append(("boundary", f"σ {self.boundary:g}: the first transformer above, the second below"))
        rows.append(("video", f"{self.height} × {self.width} pixels, {self.fps} frames a second"))
        width = max(len(label) for label, _ in rows)
        return "\n".join([f"causal recipe {self.name}", *(f"  {label:<{width}}  {text}" for label, text in rows)])


def _check_fields(given: Mapping[str, Any]) -> None:
    valid = [field.name for field in dataclasses.fields(CausalRecipe)]
    for name in given:
        if name not in valid:
            raise unknown("field of a causal recipe", name, valid)


def _checked_timesteps(name: str, value: Any) -> tuple[float, ...]:
    """Floats without the 0 at the end. Raises ConfigError unless they fall within (0, 1000]."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ConfigError(f"causal recipe: {name} must be a list of numbers, not {value!r}")
    steps = list(value)
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int | float):
            raise ConfigError(f"causal recipe: {name} must be numbers, not {step!r}")
    if steps and steps[-1] == 0:
        steps = steps[:-1]
    given = ", ".join(f"{step:g}" for step in steps)
    if not steps:
        raise ConfigError(f"causal recipe: {name} has no denoising pass; give at least one timestep above 0")
    if not all(0 < step <= TRAIN_STEPS for step in steps):
        raise ConfigError(f"causal recipe: {name} must be above 0 and at most 1000, not {given}")
    if any(later >= earlier for earlier, later in itertools.pairwise(steps)):
        raise ConfigError(f"causal recipe: {name} must fall from pass to pass, not {given}")
    return tuple(float(step) for step in steps)
