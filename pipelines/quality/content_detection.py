"""Find what is in a clip of the demo model's world, without being told the prompt: objects and background (`analyse`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from tilewise.pipelines.quality.demo_world import COLOURS, second_colour

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
