"""What happens in a clip: sampling of scene parameters, as plain numpy arrays of one row per clip.

Coordinates run from -1 (left, top) to 1 (right, bottom) whatever the resolution; time runs from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tilewise.pipelines.quality.demo_world import COLOURS, MOTIONS, PATTERNS, SHAPES

Scenes = Mapping[str, np.ndarray]

# A tenth of all (shape, colour, motion) triples is never shown in training, neither as first nor as second object, so
# that evaluation can ask for things the model has not seen together.
HELD_OUT = np.random.RandomState(7).rand(len(SHAPES), len(COLOURS), len(MOTIONS)) < 0.10


def sample_scenes(
    count: int, seed: int | tuple[int, ...], *, frames: int = 17, two_objects: float = 0.15, held_out: str = "exclude"
) -> dict[str, np.ndarray]:
    """Draw `count` scenes. `held_out` is "exclude" (training), "only" (evaluation) or "any"."""
    rng = np.random.default_rng(seed)
    scenes: dict[str, np.ndarray] = {}
    for slot in range(2):
        shape, colour, motion = _sample_identity(count, rng, held_out)
        for key, value in (("shape", shape), ("colour", colour), ("motion", motion)):
            scenes[f"{key}{slot}"] = value
        _set_paths(scenes, slot, _sample_paths(count, rng, frames, motion, smaller=slot == 1))
    for _ in range(8):  # a second object should not hide the first
        again = _overlapping(scenes)
        if again.any():
            paths = _sample_paths(count, rng, frames, scenes["motion1"], smaller=True)
            _set_paths(scenes, 1, paths, again)
    scenes["two"] = (rng.random(count) < two_objects) & ~_overlapping(scenes)
    scenes["pattern"] = rng.integers(0, len(PATTERNS), count)
    scenes["background"] = _sample_background(scenes, rng)
    scenes["frequency"] = rng.uniform(1.5, 3.0, count).astype(np.float32)
    scenes["phase"] = rng.uniform(0, 2 * np.pi, (count, 2)).astype(np.float32)
    scenes["vertical"] = rng.integers(0, 2, count)
    scenes["reversed"] = rng.integers(0, 2, count)
    return scenes


def take(scenes: Scenes, index: slice | np.ndarray) -> dict[str, np.ndarray]:
    """The scenes at `index`."""
    return {key: value[index] for key, value in scenes.items()}


def concatenate(*parts: Scenes) -> dict[str, np.ndarray]:
    """Several sets of scenes as one."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _sample_identity(count: int, rng: np.random.Generator, held_out: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    allowed = {"exclude": ~HELD_OUT, "only": HELD_OUT, "any": np.ones_like(HELD_OUT)}[held_out]
    triples = np.argwhere(allowed)
    shape, colour, motion = triples[rng.integers(0, len(triples), count)].T
    return shape, colour, motion


def _set_paths(
    scenes: dict[str, np.ndarray], slot: int, paths: tuple[np.ndarray, ...], where: np.ndarray | None = None
) -> None:
    for key, value in zip(("x", "y", "radius"), paths, strict=True):
        value = value.astype(np.float32)
        name = f"{key}{slot}"
        scenes[name] = value if where is None else np.where(where[:, None], value, scenes[name])


def _overlapping(scenes: Scenes) -> np.ndarray:
    """Whether the two objects overlap in more than a quarter of the frames."""
    distance = np.hypot(scenes["x0"] - scenes["x1"], scenes["y0"] - scenes["y1"])
    return (distance < scenes["radius0"] + scenes["radius1"]).mean(1) > 0.25


def _sample_background(scenes: Scenes, rng: np.random.Generator) -> np.ndarray:
    """A background colour that no visible object has."""
    background = rng.integers(0, len(COLOURS), len(scenes["two"]))
    while True:
        clash = (background == scenes["colour0"]) | (scenes["two"] & (background == scenes["colour1"]))
        if not clash.any():
            return background
        background[clash] = rng.integers(0, len(COLOURS), clash.sum())


def _sample_paths(
    count: int, rng: np.random.Generator, frames: int, motion: np.ndarray, *, smaller: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre and radius over time. All eight motions are computed and the wanted one is picked: simple and vectorised."""

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1))

    time = np.linspace(0, 1, frames)[None]
    still = np.zeros_like(time)
    radius = uniform(0.18, 0.34) * (0.8 if smaller else 1.0)

    # Straight motion: the path stays inside the frame when it fits, and is centred otherwise.
    distance = uniform(0.6, 1.1)
    along = uniform(-1, 1) * np.maximum(0.02, 0.95 - radius - distance / 2)
    across = uniform(-1, 1) * (0.9 - radius) + still
    shift = (time - 0.5) * distance

    orbit = uniform(0.30, 0.45)
    room = np.maximum(0.02, 0.95 - radius - orbit)
    turns = uniform(0.8, 1.1) * rng.choice([-1, 1], (count, 1))
    angle = uniform(0, 2 * np.pi) + 2 * np.pi * turns * time
    orbit_x = uniform(-1, 1) * room + orbit * np.cos(angle)
    orbit_y = uniform(-1, 1) * room + orbit * np.sin(angle)

    small, large = uniform(0.12, 0.20), uniform(0.40, 0.60)
    growth = small + (large - small) * time
    rest_x, rest_y = uniform(-0.35, 0.35) + still, uniform(-0.35, 0.35) + still

    floor = 0.93 - radius
    bounce = floor - uniform(0.6, 1.0) * np.abs(np.sin(2 * np.pi * time))

    x = [along - shift, along + shift, across, across, orbit_x, rest_x, rest_x, across]
    y = [across, across, along - shift, along + shift, orbit_y, rest_y, rest_y, bounce]
    constant = radius + still
    r = [constant, constant, constant, constant, constant, growth, growth[:, ::-1], constant]
    row = np.arange(count)
    return tuple(np.stack(values, 1)[row, motion] for values in (x, y, r))  # type: ignore[return-value]
