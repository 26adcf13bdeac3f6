"""What calibration goes by: the parts of a run, and what was measured in them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.fingerprint import Fingerprint


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, and the parts that they are divided into.

    steps: of a run. first: the first that is sparse. count: of parts, of equal length within one step, from there to the end.

    Raises:
        ConfigError: more parts than steps.
    """

    steps: int
    first: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.steps - self.first:
            raise ConfigError(
                f"calibrate: {self.steps - self.first} sparse steps of {self.steps} cannot be divided into {self.count} parts; "
                "give fewer parts or more steps"
            )

    @property
    def borders(self) -> tuple[int, ...]:
        """The first step of each part, and the end of the last."""
        return tuple(self.first + part * (self.steps - self.first) // self.count for part in range(self.count + 1))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each part."""
        return tuple(end - start for start, end in itertools.pairwise(self.borders))

    @property
    def middles(self) -> tuple[int, ...]:
        """The step of each part that is measured, of a denoiser that runs in all of them."""
        return tuple(self.measured(part, 0) for part in range(self.count))

    def measured(self, part: int, begin: int) -> int:
        """The step of a part that is measured, of a denoiser that runs from step ``begin`` on."""
        return (max(self.borders[part], begin) + self.borders[part + 1] - 1) // 2

    def part_of(self, step: int) -> int:
        """The part that a step is in; before the first, −1."""
        return bisect.bisect_right(self.borders[:-1], step) - 1


@dataclass
class DenoiserProfile:
    """What was measured of one denoiser.

    steps: in which it ran, as far as the run went. errors: {(part of the run, layer): (heads, densities)}, summed over forwards,
    not yet divided by ``output``. kept: {(part, layer): (heads, densities)}, token pairs that a call keeps at each density.
    output: {(part, layer): Σ |O W|²}.
    """

    denoiser: Fingerprint
    steps: list[int] = field(default_factory=list)
    errors: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    output: dict[tuple[int, int], float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        calls = [
            [*where, errors.tolist(), self.kept[where].tolist(), self.output[where]]
            for where, errors in self.errors.items()
        ]
        return {"denoiser": dataclasses.asdict(self.denoiser), "steps": self.steps, "calls": calls}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        profile = cls(Fingerprint.from_dict(data["denoiser"]), list(data["steps"]))
        for part, layer, errors, kept, output in data["calls"]:
            where = part, layer
            profile.errors[where] = torch.tensor(errors, dtype=torch.float64)
            profile.kept[where] = torch.tensor(kept, dtype=torch.float64)
            profile.output[where] = output
        return profile

    def nearest(self, part: int, layer: int) -> int | None:
        """The part nearest to ``part`` in which a layer was measured, the earlier of two; None: in none."""
        parts = sorted(found for found, measured in self.errors if measured == layer)
        return min(parts, key=lambda found: abs(found - part), default=None)


@dataclass
class RunProfile:
    """What one run told.

    noise: levels of its steps, in their order, as far as it went. measured_now: (denoiser, layer) that were measured in the step
    under way.
    """

    noise: list[float] = field(default_factory=list)
    denoisers: list[DenoiserProfile] = field(default_factory=list)
    measured_now: set[tuple[int, int]] = field(default_factory=set, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        return {"noise": self.noise, "denoisers": [profile.to_dict() for profile in self.denoisers]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        return cls(list(data["noise"]), [DenoiserProfile.from_dict(found) for found in data["denoisers"]])

    def steps_of(self, denoiser: int, part: int, schedule: Schedule) -> int:
        """How many steps of a part a denoiser runs in. Steps after the end of what was run are those of its last step."""
        ran = self.denoisers[denoiser].steps
        last = len(self.noise) - 1
        more = range(last + 1, schedule.steps) if last in ran else ()
        return sum(schedule.part_of(step) == part for step in (*ran, *more))
