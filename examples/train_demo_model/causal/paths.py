"""Motion that goes on for as long as wanted: a clip's scenes, continued beyond its last frame, with colours that change.

Straight motion turns round at the frame's border, circling and bouncing go on, growing and shrinking take turns. Speeds a frame
are those of the short clips, and the first frames are theirs too.
"""

from __future__ import annotations

import numpy as np

from tilewise.pipelines.quality.demo_world import COLOURS, MOTIONS

from ..scenes import Scenes, sample_scenes

SMALLEST, LARGEST = 0.12, 0.55  # radius at which growing turns into shrinking and back
BORDER = 0.95  # how far a straight path's object reaches


def continuing_scenes(
    count: int,
    seed: int | tuple[int, ...],
    *,
    frames: int,
    clip_frames: int = 17,
    two_objects: float = 0.1,
    held_out: str = "exclude",
) -> dict[str, np.ndarray]:
    """Scenes as `sample_scenes` draws them, their paths going on for `frames` frames instead of `clip_frames`."""
    scenes = sample_scenes(count, seed, frames=clip_frames, two_objects=two_objects, held_out=held_out)
    for slot in range(2):
        x, y, radius = (scenes[f"{key}{slot}"].astype(np.float64) for key in ("x", "y", "radius"))
        paths = continue_paths(x, y, radius, scenes[f"motion{slot}"], frames)
        for key, values in zip(("x", "y", "radius"), paths, strict=True):
            scenes[f"{key}{slot}"] = values.astype(np.float32)
    return scenes


def continue_paths(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, motion: np.ndarray, frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paths (clips, frames) that begin like the given ones (clips, ≥ 17 frames of `sample_scenes`) and go on.

    Only the first frames are read: what moves with a constant speed needs two of them, a circle three, a bounce one period.
    """
    time = np.arange(frames)[None]
    kind = np.array(MOTIONS)[motion][:, None]
    reach = np.maximum(BORDER - radius[:, :1], 0.05)
    straight = [_to_and_fro(p[:, :1] + (p[:, 1:2] - p[:, :1]) * time, -reach, reach) for p in (x, y)]
    round_x, round_y = _circle(x, y, time)
    size = _to_and_fro(radius[:, :1] + (radius[:, 1:2] - radius[:, :1]) * time, SMALLEST, LARGEST)
    period = (x.shape[1] - 1) // 2  # two bounces a clip
    bounce = y[:, time[0] % period]
    horizontal, vertical = np.isin(kind, ("left", "right")), np.isin(kind, ("up", "down"))
    circling, bouncing = kind == "circling", kind == "bouncing"
    still_x, still_y = np.broadcast_to(x[:, :1], size.shape), np.broadcast_to(y[:, :1], size.shape)
    new_x = np.where(horizontal, straight[0], np.where(circling, round_x, still_x))
    new_y = np.where(vertical, straight[1], np.where(circling, round_y, np.where(bouncing, bounce, still_y)))
    new_radius = np.where(np.isin(kind, ("growing", "shrinking")), size, radius[:, :1])
    return new_x, new_y, new_radius


def _to_and_fro(path: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """The path folded back into [low, high] wherever it leaves it."""
    length = high - low
    return low + length - np.abs((path - low) % (2 * length) - length)


def _circle(x: np.ndarray, y: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The circle through the first three points, at their speed. (Where the points are on a line, the result is not used.)"""
    point = x + 1j * y
    first, second = point[:, 1] - point[:, 0], point[:, 2] - point[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = np.nan_to_num(second / first)
        centre = np.nan_to_num(point[:, 0] - first / (turn - 1))
    arm = (point[:, 0] - centre)[:, None]
    path = centre[:, None] + arm * np.exp(1j * np.angle(turn)[:, None] * time)
    return path.real, path.imag


def change_colours(scenes: Scenes, seed: int | tuple[int, ...], at: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
    """Scenes whose object, background or both take another colour at frame `at` (clips,), and the scenes of the new state.

    In the first result `colour0` and `background` are (clips, frames), which `render` takes; captions come from the second one.
    Frames before `at` keep the colours, so an `at` beyond the last frame changes nothing there.
    """
    rng = np.random.default_rng(seed)
    count, frames = scenes["x0"].shape
    kind = rng.random(count)
    after = dict(scenes)
    for key, chosen in (("colour0", kind < 0.75), ("background", kind >= 0.6)):
        taken = np.stack(
            [scenes[key], after["colour0"], after["background"], np.where(scenes["two"], scenes["colour1"], -1)]
        )
        new = rng.integers(0, len(COLOURS), count)
        while (clash := (taken == new).any(0)).any():
            new[clash] = rng.integers(0, len(COLOURS), clash.sum())
        after[key] = np.where(chosen, new, scenes[key])
    late = np.arange(frames)[None] >= at[:, None]
    both = {key: np.where(late, after[key][:, None], scenes[key][:, None]) for key in ("colour0", "background")}
    return {**scenes, **both}, after
