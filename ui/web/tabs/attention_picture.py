"""What one query sees, drawn over the clip: what is seen keeps its colours inside a bright line, the rest goes dark and grey.

Coordinates: t, h, w are tokens of the grid (latent frames and patches); each covers a rectangle of the frame's pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

LARGE, SMALL = 640, 168  # pixels of the longer side: the chosen frame, and one of the strip
SEEN = (255, 176, 0)  # the line around what is seen, and its tint
QUERY = (255, 255, 255)
GAP, LABEL = 10, 18
STRIP_WIDTH = 1200
DIM = 0.42  # brightness of what is not seen


def base_pictures(
    frames: NDArray[np.uint8] | None, grid: tuple[int, int, int], pixels: tuple[int, int]
) -> list[Image.Image]:
    """One picture for each latent frame: of a clip (T, H, W, 3), the frame at that time; without one, a plain chequerboard of
    tokens. pixels: (height, width) of the clip, for its proportions."""
    t, h, w = grid
    if frames is None:
        board = 150 + 14 * (np.add.outer(np.arange(h), np.arange(w)) % 2)
        plain = (
            Image.fromarray(board.astype(np.uint8))
            .convert("RGB")
            .resize((pixels[1], pixels[0]), Image.Resampling.NEAREST)
        )
        return [plain] * t
    last = len(frames) - 1
    return [Image.fromarray(frames[round(i * last / max(t - 1, 1))]) for i in range(t)]


def one_frame(
    picture: Image.Image, seen: NDArray[np.bool_], query: tuple[int, int] | None, longest: int = LARGE
) -> Image.Image:
    """A frame with its part of a region, (h, w) bool, and the query (row, column) if it is in this frame."""
    size = frame_size(picture.size, longest)
    colours = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    mask = np.asarray(Image.fromarray(seen.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127
    grey = colours.mean(-1, keepdims=True) * DIM
    tinted = colours * 0.88 + np.array(SEEN, np.float32) * 0.12
    drawn = np.where(mask[..., None], colours if seen.all() else tinted, grey)
    if not seen.all():
        width = 3 if longest >= 400 else 1
        thick = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(2 * width + 1))
        inner = np.asarray(thick) > 127
        drawn = np.where((mask & ~inner)[..., None], np.array(SEEN, np.float32), drawn)
    image = Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))
    if query is not None:
        _mark(image, cell(query, seen.shape, size))
    return image


def as_means(picture: Image.Image, cells: NDArray[np.integer]) -> Image.Image:
    """A frame in which each cell, a number from 1 in (h, w), has the mean of its colours: what a query sees of a far field."""
    colours = np.asarray(picture.convert("RGB"), np.float32)
    numbers = Image.fromarray(cells.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
    flat, pixels = np.asarray(numbers).ravel(), colours.reshape(-1, 3)
    count = np.bincount(flat)
    means = (
        np.stack([np.bincount(flat, pixels[:, channel]) for channel in range(3)], -1) / np.maximum(count, 1)[:, None]
    )
    drawn = np.where((flat > 0)[:, None], means[flat], pixels).reshape(colours.shape)
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def frame_size(pixels: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) of a drawn frame for a clip of `pixels` (width, height)."""
    scale = longest / max(pixels)
    return max(1, round(pixels[0] * scale)), max(1, round(pixels[1] * scale))


def strip(
    pictures: list[Image.Image],
    region: NDArray[np.bool_] | NDArray[np.floating],
    position: tuple[int, int, int],
    longest: int = SMALL,
) -> Image.Image:
    """Every latent frame in reading order, with its number and the share of it that is seen; the query's frame is framed.

    region: (T, H, W), bool, or a map of weights, which is drawn from dark to bright and summed up for each frame.
    """
    size = frame_size(pictures[0].size, longest)
    one, scale = (one_frame, 1.0) if region.dtype == bool else (heat, 1 / max(float(region.max()), 1e-12))
    places = strip_places(len(pictures), size)
    wide, high = (max(place[axis] for place in places) + size[axis] + GAP for axis in (0, 1))
    sheet = Image.new("RGB", (wide, high), (24, 26, 32))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for t, (left, top) in enumerate(places):
        here = t == position[0]
        part = region[t] if region.dtype == bool else region[t] * scale
        sheet.paste(one(pictures[t], part, position[1:] if here else None, longest), (left, top))
        words = f"{t}: {region[t].mean() if region.dtype == bool else region[t].sum():.0%}"
        draw.text((left, top - LABEL), words, fill=QUERY if here else (170, 174, 184), font=font)
        if here:
            draw.rectangle((left - 3, top - 3, left + size[0] + 2, top + size[1] + 2), outline=QUERY, width=2)
    return sheet


def strip_places(frames: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """(left, top) of each frame of a strip."""
    columns = max(1, min(frames, STRIP_WIDTH // (size[0] + GAP)))
    return [
        (GAP + (t % columns) * (size[0] + GAP), GAP + LABEL + (t // columns) * (size[1] + LABEL + GAP))
        for t in range(frames)
    ]


def heat(
    picture: Image.Image, values: NDArray[np.floating], query: tuple[int, int] | None, longest: int = LARGE
) -> Image.Image:
    """A frame with a map (h, w) of values in 0..1 over it, from dark to bright: how much the query minds each place."""
    size = frame_size(picture.size, longest)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] * 0.35
    level = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    share = np.asarray(level, np.float32)[..., None] / 255
    image = Image.fromarray((grey + share * np.array(SEEN, np.float32) * 0.9).clip(0, 255).astype(np.uint8))
    if query is not None:
        _mark(image, cell(query, values.shape, size))
    return image


def cell(place: tuple[int, int], grid: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels (left, top, right, bottom) of the token at (row, column) in a picture of `size` (width, height)."""
    (row, column), (rows, columns), (width, height) = place, grid[-2:], size
    left, right = round(column * width / columns), round((column + 1) * width / columns)
    return left, round(row * height / rows), right - 1, round((row + 1) * height / rows) - 1


def token_at(x: float, y: float, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (row, column) of the token at a pixel of a picture of `size` (width, height)."""
    row, column = int(y * grid[0] / size[1]), int(x * grid[1] / size[0])
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


def _mark(image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """The query: its token outlined, in a ring that is seen on any background."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=1)
    draw.rectangle(box, outline=QUERY, width=2 if right - left > 6 else 1)
    x, y = (left + right) / 2, (top + bottom) / 2
    for radius, colour, width in ((1.25, (0, 0, 0), 4), (1.25, QUERY, 2)):
        r = radius * max(right - left, bottom - top, 8)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width)
