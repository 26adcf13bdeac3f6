"""What is left of a long clip: object, background and motion after hundreds of frames, jumps at chunk borders, changes of prompt.

Everything is measured by the detector in `tilewise.pipelines.quality`, on frames alone. Positions are in pixels of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from tilewise.pipelines.quality.content_detection import ClipContent, DetectedObject, analyse
from tilewise.pipelines.quality.content_score import ExpectedContent, parse_prompt
from tilewise.pipelines.quality.demo_world import COLOURS

JUMP = 1.5  # times the median step
SLACK = 0.5  # pixels: how exactly a centre is known
FROZEN = 0.4  # of the first quarter's activity; and half a pixel a frame
GROWING = ("growing", "shrinking")
UNEVEN = (*GROWING, "bouncing")  # no steps of one length, even when drawn perfectly


def borders(frames: int, chunk: int) -> list[int]:
    """First frames of the second and later chunks of `chunk` latents: the first latent has one frame, the others two each."""
    return list(range(2 * chunk - 1, frames, 2 * chunk))


def measure_clip(prompt: str, clip: np.ndarray, chunk: int = 3, at: Sequence[int] | None = None) -> dict[str, Any]:
    """One clip (frames, height, width, 3), uint8, that shows one object; values that do not apply are None.

    at: first frames of its second and later parts. Default: those of chunks of `chunk` latents.
    """
    expected = parse_prompt(prompt)
    size = clip.shape[1]
    quarters = np.array_split(clip, 4)
    contents = [analyse(quarter) for quarter in quarters]
    tracks = [
        _track(_thing(content, expected), len(quarter)) for content, quarter in zip(contents, quarters, strict=True)
    ]
    last = contents[-1]
    track = np.concatenate(tracks) * (size / 2, size / 2, size**2)
    activity = [_activity(part) for part in np.array_split(track, 4)]
    things = [_thing(content, expected) for content in contents]
    right = {
        "object": things[-1] is not None,
        "background": last.background_colour == expected.background_colour,
        "pattern": last.background_pattern == expected.background_pattern,
    }
    drawn = [_background(quarter, expected) for quarter in quarters]
    return {
        "prompt": prompt,
        "kept": right["object"] and right["background"],
        **right,
        "first_object": things[0] is not None,
        "alone": last.count == 1,
        "moving": bool(activity[-1] > max(0.5, FROZEN * activity[0])),
        "kind": _right_kind(expected.objects[0].motion, np.array_split(track, 4)[-1]),
        **_border_steps(track, expected.objects[0].motion, borders(len(track), chunk) if at is None else at),
        "drift": [round(float(np.linalg.norm(colour - drawn[0])) * 255, 2) for colour in drawn[1:]],
        "activity": [round(value, 2) for value in activity],
    }


def measure_change(before: str, after: str, clip: np.ndarray, chunk_number: int, chunk: int = 3) -> dict[str, Any]:
    """One clip whose prompt changes at the border before the chunk with this number.

    Of the second and third chunk after that: "colour", object and background as asked for; "new_colour", the same with an object
    of any shape. "goes_on": the object is found where its motion leads.
    """
    old, new = parse_prompt(before), parse_prompt(after)
    size = clip.shape[1]
    frame = 2 * chunk * chunk_number - 1
    second = analyse(clip[frame + 2 * chunk : frame + 4 * chunk])
    earlier, later = clip[:frame], clip[frame : frame + 8 * chunk]
    first = _track(_thing(analyse(earlier), old), len(earlier))[:, :2] * (size / 2)
    then = _track(_thing(analyse(later), new), len(later))[:, :2] * (size / 2)
    steps = np.linalg.norm(np.diff(first, axis=0), axis=1)
    found = np.flatnonzero(np.isfinite(then[:, 0]))
    goes_on = False
    if len(found) and np.isfinite(first[-1, 0]):
        gap = float(np.linalg.norm(then[found[0]] - first[-1]))
        goes_on = gap <= JUMP * float(np.nanmedian(steps)) * (int(found[0]) + 1) + 2 * SLACK
    return {
        "before": before,
        "after": after,
        "colour": _thing(second, new) is not None and second.background_colour == new.background_colour,
        "new_colour": any(thing.colour == new.objects[0].colour for thing in second.objects)
        and second.background_colour == new.background_colour,
        "goes_on": bool(goes_on),
    }


def measure_clips(
    prompts: Sequence[str], clips: Sequence[np.ndarray], chunk: int = 3, pool: Executor | None = None
) -> dict[str, Any]:
    """Shares over all clips, and each clip's row."""
    rows = list((pool.map if pool else map)(partial(measure_clip, chunk=chunk), prompts, clips))
    drift = np.array([row["drift"] for row in rows])
    shares = ("kept", "object", "background", "pattern", "first_object", "alone", "moving", "kind")
    return {
        "clips": len(rows),
        **{key: _share(rows, key) for key in (*shares, "border_steps", "inner_steps")},
        "drift": [round(float(value), 2) for value in np.median(drift, 0)],
        "rows": rows,
    }


def measure_changes(
    before: Sequence[str],
    after: Sequence[str],
    clips: Sequence[np.ndarray],
    number: int,
    chunk: int = 3,
    pool: Executor | None = None,
) -> dict[str, Any]:
    """Shares over all clips with a change of prompt before the chunk `number`, and each clip's row."""
    work = partial(measure_change, chunk_number=number, chunk=chunk)
    rows = list((pool.map if pool else map)(work, before, after, clips))
    return {"clips": len(rows), **{key: _share(rows, key) for key in ("colour", "new_colour", "goes_on")}, "rows": rows}


def _share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row[key] is not None]
    return round(float(np.mean(values)), 4) if values else None


def _thing(content: ClipContent, expected: ExpectedContent) -> DetectedObject | None:
    """The object that was asked for, by colour and shape."""
    want = expected.objects[0]
    for thing in content.objects:
        if thing.colour == want.colour and thing.shape == want.shape:
            return thing
    return None


def _track(thing: DetectedObject | None, frames: int) -> np.ndarray:
    return np.full((frames, 3), np.nan) if thing is None else thing.track


def _activity(track: np.ndarray) -> float:
    """Mean change a frame of centre and side length, in pixels; 0 where nothing was found."""
    change = np.abs(np.diff(np.column_stack([track[:, :2], np.sqrt(track[:, 2])]), axis=0))
    total = np.hypot(change[:, 0], change[:, 1]) + change[:, 2]
    return float(np.nanmean(total)) if np.isfinite(total).any() else 0.0


def _border_steps(track: np.ndarray, motion: str | None, begins: Sequence[int]) -> dict[str, float | None]:
    """Share of the steps across the borders of parts, and of all others, that are no jumps. Only for motion of an even speed.

    begins: first frames of the second and later parts.
    """
    steps = np.linalg.norm(np.diff(track[:, :2], axis=0), axis=1)
    if motion in UNEVEN or not np.isfinite(steps).any():
        return {"border_steps": None, "inner_steps": None}
    calm = steps <= JUMP * np.nanmedian(steps) + SLACK
    at = np.array([frame - 1 for frame in begins if frame < len(track)], int)
    known = np.isfinite(steps)
    inner = known.copy()
    inner[at] = False
    at = at[known[at]]
    return {
        "border_steps": round(float(calm[at].mean()), 4) if len(at) else None,
        "inner_steps": round(float(calm[inner].mean()), 4) if inner.any() else None,
    }


def _right_kind(motion: str | None, track: np.ndarray) -> bool | None:
    """Whether the motion still goes along the axis, or through the sizes, that the prompt asks for."""
    if motion is None:
        return None
    seen = track[np.isfinite(track[:, 0])]
    if len(seen) < len(track) // 2:
        return False
    across, along = np.ptp(seen[:, 0]), np.ptp(seen[:, 1])
    if motion in GROWING:
        return bool(seen[:, 2].max() > 2 * seen[:, 2].min())
    if motion in ("left", "right"):
        return bool(across > 2 * along)
    if motion in ("up", "down", "bouncing"):
        return bool(along > 2 * across)
    return bool(min(across, along) > 0.45 * max(across, along))


def _background(frames: np.ndarray, expected: ExpectedContent) -> np.ndarray:
    """Mean colour of what the object does not cover, from 0 to 1."""
    pixels = frames.reshape(-1, 3).astype(np.float32) / 255
    far = np.linalg.norm(pixels - np.array(COLOURS[expected.objects[0].colour or "red"], np.float32), axis=1) > 0.35
    mean: np.ndarray = pixels[far].mean(0) if far.any() else pixels.mean(0)
    return mean
