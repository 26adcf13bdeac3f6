"""What is in a clip of the demo world: coloured shapes moving over a patterned background.

The bundled demo model draws clips of this small world, and this module reads them back, without being told the prompt:
`analyse` finds the objects (colour, shape, motion) and the background. `parse_prompt` turns a prompt in the world's
language into the same terms, and `score` compares the two, so generated clips can be judged without a human.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull, QhullError

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.67, 0.24),
    "blue": (0.16, 0.31, 0.86),
    "yellow": (0.94, 0.86, 0.20),
    "purple": (0.55, 0.24, 0.75),
    "orange": (0.96, 0.55, 0.12),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "circling", "growing", "shrinking", "bouncing")
PATTERNS = ("plain", "striped", "checkered", "gradient")
ATTRIBUTES = ("colour", "shape", "count", "motion", "background_colour", "background_pattern", "background")


def second_colour(colour):  # an array of numpy or torch
    """The other end of a striped, checkered or gradient background: the same hue, washed out towards grey."""
    return 0.6 * colour + 0.2


_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_SECOND = second_colour(_PALETTE)


@dataclass(frozen=True, eq=False)
class DetectedObject:
    """One object of a clip. `track` is (frames, 3): centre x, centre y (-1 to 1) and area as a share of the frame."""

    colour: str
    shape: str | None
    motion: str | None
    presence: float
    track: np.ndarray


@dataclass(frozen=True, eq=False)
class ClipContent:
    """What `analyse` found, the most prominent object first."""

    objects: tuple[DetectedObject, ...]
    background_colour: str | None
    background_pattern: str | None

    @property
    def count(self) -> int:
        """How many objects there are."""
        return len(self.objects)


@dataclass(frozen=True)
class ExpectedObject:
    """One object of a prompt; None is what the prompt does not say."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class ExpectedContent:
    """What a prompt asks for."""

    objects: tuple[ExpectedObject, ...] = field(default=())
    background_colour: str | None = None
    background_pattern: str | None = None


# --- from pixels to content ---------------------------------------------------------------------------------------


def analyse(frames: np.ndarray) -> ClipContent:
    """Find objects and background in (frames, height, width, 3), uint8 or floats from 0 to 1. Never raises on content."""
    video = np.asarray(frames)
    if video.ndim != 4 or video.shape[-1] != 3 or not video.size:
        raise ValueError(f"a clip is (frames, height, width, 3), not {video.shape}")
    video = video.astype(np.float32) / (255 if video.dtype == np.uint8 else 1)
    video = np.clip(np.nan_to_num(video), 0, 1)
    distance, position = _distance_to_backgrounds(video)
    background = int(np.minimum(distance, 0.25).mean((1, 2, 3)).argmin())
    found = _find_objects(video, distance[background], background)
    colour, pattern = _describe_background(distance[background], position[background], background, found)
    objects = [_describe(_NAMES[index], masks) for index, masks in found]
    if colour is None:  # then this may be no clip of this world at all, and a blob without a shape is no object
        objects = [thing for thing in objects if thing.shape is not None]
    ranked = sorted(objects, key=lambda o: -o.presence * float(np.nanmedian(o.track[:, 2])) ** 0.5)
    return ClipContent(tuple(ranked), colour, pattern)


def _distance_to_backgrounds(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each background colour, every pixel's distance to its range of shades, and where on that range it lies."""
    distances, positions = [], []
    for first, second in zip(_PALETTE, _SECOND, strict=True):
        axis = second - first
        position = np.clip((video - first) @ axis / (axis @ axis), 0, 1)
        distances.append(np.linalg.norm(video - first - position[..., None] * axis, axis=-1))
        positions.append(position)
    return np.stack(distances), np.stack(positions)


def _find_objects(video: np.ndarray, to_background: np.ndarray, background: int) -> list[tuple[int, np.ndarray]]:
    """Colour and (frames, height, width) mask of every object that is there most of the time."""
    height, width = video.shape[1:3]
    distance = np.linalg.norm(video[..., None, :] - _PALETTE, axis=-1)
    distance[..., background] = np.inf
    # Blended pixels along an outline can have a third colour, but such rims are thin: an object has a core that is not.
    core = max(1.6, 0.018 * min(height, width))
    nearest, near = distance.argmin(-1), distance.min(-1)
    clear = (near < 0.27) & (near < to_background)
    present = []
    for colour in range(len(_NAMES)):
        masks = clear & (nearest == colour)
        thick = [_thickness(mask) >= core if mask.sum() >= 0.002 * mask.size else False for mask in masks]
        if np.mean(thick) >= 0.4:
            present.append(colour)
    if not present:
        return []
    # With the colours known, decide each pixel between them and the background only: outlines come out exact.
    choice = np.concatenate([to_background[..., None], distance[..., present]], -1).argmin(-1)
    found: list[tuple[int, np.ndarray]] = []
    for index, colour in enumerate(present):
        found += [(colour, masks) for masks in _separate(choice == index + 1, core)]
    return found


def _thickness(mask: np.ndarray) -> float:
    """The radius of the largest disc that fits in the mask (the frame's border does not count as an edge)."""
    return float(ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge")).max())


def _separate(masks: np.ndarray, core: float) -> list[np.ndarray]:
    """Split one colour's pixels into objects, followed through time by nearest centres."""
    parts: list[list[np.ndarray]] = []
    for mask in masks:
        labels, count = ndimage.label(mask)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        order = np.argsort(-sizes)[:4]
        blobs = [labels == number + 1 for number in order if sizes[number] >= 0.002 * mask.size]
        # A ragged blob is noise: even a star holds a disc of more than a third of its area's square root.
        parts.append([blob for blob in blobs if _thickness(blob) >= max(core, 0.22 * blob.sum() ** 0.5)])
    # Two objects of a colour are two blobs most of the time; anything rarer is one object that something cut in two.
    several = np.mean([len(blobs) >= 2 for blobs in parts]) > 0.6
    tracks = [np.zeros_like(masks) for _ in range(2 if several else 1)]
    centres: list[np.ndarray | None] = [None] * len(tracks)
    for frame, blobs in enumerate(parts):
        free = list(blobs)
        for slot, centre in enumerate(centres):
            if not free:
                break
            if centre is None:
                chosen = 0
            else:
                reach = [np.linalg.norm(np.argwhere(blob).mean(0) - centre) for blob in free]
                # Without a rival the largest blob is the object, however far it moved.
                chosen = int(np.argmin(reach)) if several else 0
            tracks[slot][frame] = free[chosen]
            centres[slot] = np.argwhere(free[chosen]).mean(0)
            del free[chosen]
    return [track for track in tracks if track.any((1, 2)).mean() >= 0.4]


def _describe(colour: str, masks: np.ndarray) -> DetectedObject:
    height, width = masks.shape[1:]
    track = np.full((len(masks), 3), np.nan)
    for frame, mask in enumerate(masks):
        ys, xs = np.nonzero(mask)
        if len(ys):
            centre_x, centre_y = (xs.mean() + 0.5) / width, (ys.mean() + 0.5) / height
            track[frame] = 2 * centre_x - 1, 2 * centre_y - 1, len(ys) / mask.size
    presence = float(np.isfinite(track[:, 0]).mean())
    return DetectedObject(colour, classify_shape(masks), classify_motion(track), presence, track)


# Fill of the bounding box, fill of the convex hull, and spread (second moment over area) of each shape as it is drawn
# here; the scales say how far apart two values must be to matter. Measured once on renderings.
_SHAPE_FEATURES = {
    "circle": (0.79, 0.97, 0.159),
    "square": (1.00, 1.00, 0.167),
    "triangle": (0.52, 0.95, 0.192),
    "star": (0.41, 0.58, 0.196),
}
_FEATURE_SCALES = np.array([0.08, 0.10, 0.012])


def shape_features(mask: np.ndarray) -> tuple[float, float, float] | None:
    """Fill of the bounding box, fill of the convex hull, spread; None for a mask without extent."""
    ys, xs = np.nonzero(mask)
    area = len(ys)
    if area < 12:
        return None
    box = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
    corners = np.stack([ys, xs], 1)[:, None] + np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])
    try:
        hull = ConvexHull(corners.reshape(-1, 2)).volume
    except QhullError:
        return None
    return float(area / box), float(area / hull), float((ys.var() + xs.var()) / area)


def classify_shape(masks: np.ndarray) -> str | None:
    """The shape that the clearest frames show: large, and not cut off by the frame's border."""
    areas = masks.sum((1, 2))
    border = masks[:, :1].any((1, 2)) | masks[:, -1:].any((1, 2)) | masks[..., 0].any(1) | masks[..., -1].any(1)
    clarity = areas * np.where(border, 0.2, 1.0)
    best = [index for index in np.argsort(-clarity)[:5] if areas[index]]
    measured = [features for features in (shape_features(masks[index]) for index in best) if features is not None]
    if not measured:
        return None
    features = np.median(measured, 0)
    costs = {
        name: float(np.square((features - values) / _FEATURE_SCALES).sum()) for name, values in _SHAPE_FEATURES.items()
    }
    name = min(costs, key=costs.__getitem__)
    return name if costs[name] < 16 else None


def classify_motion(track: np.ndarray) -> str | None:
    """The kind of motion of a (frames, 3) track with NaN where the object was not found."""
    seen = track[np.isfinite(track[:, 0])]
    if len(seen) < max(3, 0.45 * len(track)):
        return None
    end = max(1, len(seen) // 6)
    growth = float(np.log(np.median(seen[-end:, 2]) / np.median(seen[:end, 2])))
    points = seen[:, :2]
    path = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    net = points[-1] - points[0]
    spread = np.ptp(points, axis=0)
    if abs(growth) > (0.8 if path < 0.6 else np.inf) or (path < 0.25 and abs(growth) > 0.5):
        return "growing" if growth > 0 else "shrinking"
    if path < 0.25:
        return None
    if np.linalg.norm(net) > 0.8 * path:
        if abs(net[0]) > abs(net[1]):
            return "left" if net[0] < 0 else "right"
        return "up" if net[1] < 0 else "down"
    if spread[0] < 0.35 * spread[1]:
        return "bouncing"
    return "circling" if spread.min() > 0.45 * spread.max() else None


def _describe_background(
    distance: np.ndarray, position: np.ndarray, background: int, found: list[tuple[int, np.ndarray]]
) -> tuple[str | None, str | None]:
    """Colour and pattern from what the objects do not cover, averaged over time: the background does not move."""
    covered = np.zeros(distance.shape, bool)
    grow = max(2, round(0.025 * min(distance.shape[1:])))
    for _, masks in found:
        covered |= masks
    covered = ndimage.binary_dilation(covered, np.ones((1, 3, 3), bool), iterations=grow)
    free = ~covered
    if free.mean() < 0.05 or np.median(distance[free]) > 0.15:
        return None, None
    visible = free.sum(0)
    shade = np.where(free, position, 0).sum(0) / np.maximum(visible, 1)
    known = visible > 0
    values = shade[known]
    if values.std() < 0.13:
        return _NAMES[background], "plain"
    ys, xs = np.nonzero(known)
    plane = np.stack([np.ones_like(values), ys, xs], 1)
    solution = np.linalg.lstsq(plane, values, rcond=None)[0]
    if np.square(plane @ solution - values).mean() < 0.35 * values.var():
        return _NAMES[background], "gradient"
    # Stripes vary along one axis only, so that the means over the other axis keep (almost) all of the variance.
    masked = np.ma.masked_array(shade, ~known)
    kept = max(float(masked.mean(0).var()), float(masked.mean(1).var())) / float(values.var())
    return _NAMES[background], "striped" if kept > 0.45 else "checkered"


# --- prompts ------------------------------------------------------------------------------------------------------

_SHAPE_WORDS = {**{name: name for name in SHAPES}, **{name + "s": name for name in SHAPES}}
_SHAPE_WORDS |= {"ball": "circle", "disc": "circle", "disk": "circle", "box": "square", "cube": "square"}
_MOTION_WORDS = {
    "left": ("left", "leftwards"),
    "right": ("right", "rightwards"),
    "up": ("up", "upwards", "upward", "rising", "rises"),
    "down": ("down", "downwards", "downward", "falling", "falls"),
    "circling": ("circling", "orbiting"),
    "growing": ("growing", "grows", "bigger", "larger"),
    "shrinking": ("shrinking", "shrinks", "smaller"),
    "bouncing": ("bouncing", "bounces"),
}
_PATTERN_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripes", "stripy"),
    "checkered": ("checkered", "checkerboard", "chequered", "checked"),
    "gradient": ("gradient",),
}
_MEANING = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", shape) for word, shape in _SHAPE_WORDS.items()},
    **{word: ("motion", motion) for motion, words in _MOTION_WORDS.items() for word in words},
    **{word: ("pattern", pattern) for pattern, words in _PATTERN_WORDS.items() for word in words},
    "background": ("background", ""),
}


def parse_prompt(text: str) -> ExpectedContent:
    """What a prompt in the demo world's language asks for. Unknown words are ignored, missing attributes are None."""
    text = re.sub(r"\bin (a circle|circles)\b", "circling", text.lower())
    text = re.sub(r"\b(?:(?:bouncing|bounces) )?up and down\b", "bouncing", text)
    words = [_MEANING[word] for word in re.findall(r"[a-z]+", text) if word in _MEANING]
    objects: list[dict[str, str]] = []
    background: dict[str, str] = {}
    pending: dict[str, str] = {}
    for index, (kind, value) in enumerate(words):
        following = words[index + 1][0] if index + 1 < len(words) else None
        if kind == "shape":
            said = {"colour": pending.pop("colour", None), "shape": value, "motion": pending.pop("motion", None)}
            objects.append({key: word for key, word in said.items() if word})
        elif kind == "motion":
            waiting = [thing for thing in objects if "motion" not in thing]
            (waiting[-1] if waiting else pending).setdefault("motion", value)
        elif kind == "background":
            background = {
                "pattern": "plain",
                **{key: pending.pop(key) for key in ("colour", "pattern") if key in pending},
            }
        else:
            if kind == "colour" and "colour" in pending and not objects:  # "a red thing on blue": a shape not known
                objects.append({"colour": pending["colour"]})
            pending[kind] = value
            if value == "gradient" and following != "background":  # "a blue gradient" is a background by itself
                background = {key: pending.pop(key) for key in ("colour", "pattern") if key in pending}
    if not background:
        background = {key: pending[key] for key in ("colour", "pattern") if key in pending}
    return ExpectedContent(
        tuple(ExpectedObject(**thing) for thing in objects), background.get("colour"), background.get("pattern")
    )


def score(content: ClipContent, expected: ExpectedContent) -> dict[str, bool | None]:
    """Which attributes are as expected; None where nothing was expected. With two objects, both must be right."""
    result: dict[str, bool | None] = dict.fromkeys(ATTRIBUTES)
    result["count"] = content.count == len(expected.objects) if expected.objects else None
    wanted = expected.objects
    chosen = _assign(wanted, content.objects[: len(wanted) + 4])
    result.update({key: _all_right(wanted, chosen, key) for key in ("colour", "shape", "motion")})
    colour, pattern = expected.background_colour, expected.background_pattern
    result["background_colour"] = None if colour is None else content.background_colour == colour
    result["background_pattern"] = None if pattern is None else content.background_pattern == pattern
    said = [right for right in (result["background_colour"], result["background_pattern"]) if right is not None]
    result["background"] = all(said) if said else None
    return result


def _assign(wanted: tuple[ExpectedObject, ...], found: tuple[DetectedObject, ...]) -> list[DetectedObject | None]:
    """For each wanted object the found one that it is judged by: the assignment with the most right, in polynomial time.

    The most prominent objects come first in `found`: where several assignments are equally right, the first wanted object
    gets the most prominent one it can have, then the second, and so on.
    """
    # Objects are told apart by their colour; the rest breaks ties.
    weights = {"colour": 10, "shape": 2, "motion": 1}
    value = np.array(
        [[sum(w * _matches(want, have, key) for key, w in weights.items()) for have in found] for want in wanted], int
    ).reshape(len(wanted), len(found))
    chosen: list[DetectedObject | None] = []
    free = list(range(len(found)))
    best = _most(value)
    for row in range(len(wanted)):
        taken = None
        for column in free:
            others = _most(value[np.ix_(range(row + 1, len(wanted)), [other for other in free if other != column])])
            if value[row, column] + others == best:
                taken, best = column, others
                free.remove(column)
                break
        chosen.append(None if taken is None else found[taken])  # none: its rivals need every object that is left
    return chosen


def _most(value: np.ndarray) -> int:
    """The largest sum over pairs of a row and a column of its own."""
    return int(value[linear_sum_assignment(value, maximize=True)].sum())


def _matches(want: ExpectedObject, have: DetectedObject | None, key: str) -> bool:
    value = getattr(want, key)
    return value is not None and have is not None and getattr(have, key) == value


def _all_right(wanted: tuple[ExpectedObject, ...], chosen: list[DetectedObject | None], key: str) -> bool | None:
    said = [(want, have) for want, have in zip(wanted, chosen, strict=True) if getattr(want, key) is not None]
    return all(_matches(want, have, key) for want, have in said) if said else None
