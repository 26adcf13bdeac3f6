"""Scenes to pixels: batched, anti-aliased, on any device and at any resolution."""

from __future__ import annotations

import math

import numpy as np
import torch

from tilewise.pipelines.quality.demo_world import COLOURS, second_colour

from .scenes import Scenes


@torch.no_grad()
def render(
    scenes: Scenes, device: torch.device | str = "cpu", height: int = 128, width: int | None = None
) -> torch.Tensor:
    """Draw the scenes: (clips, 3, frames, height, width), float32 in [-1, 1].

    `colour0`, `colour1` and `background` are (clips,), or (clips, frames) where they change.
    """
    width = width or height
    pixel = 2.0 / height

    def tensor(key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(scenes[key])).to(device=device, dtype=dtype)

    palette = torch.tensor(list(COLOURS.values()), device=device)
    xs = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * (width / height)
    ys = (torch.arange(height, device=device) + 0.5) / height * 2 - 1

    def colour(key: str) -> torch.Tensor:
        """(clips, 3, 1 or frames, 1, 1): a scene's colours may be one a clip or one a frame."""
        values = palette[tensor(key, torch.long)]
        return (values[:, None] if values.ndim == 2 else values).transpose(1, 2)[..., None, None]

    first = colour("background")
    mix = _pattern(tensor, xs, ys, pixel)[:, None, None]
    frames = scenes["x0"].shape[1]
    video = (first * mix + second_colour(first) * (1 - mix)).expand(-1, -1, frames, -1, -1)
    for slot in range(2):
        if slot == 1 and not scenes["two"].any():
            break
        dx, dy = torch.broadcast_tensors(
            xs - tensor(f"x{slot}")[..., None, None], ys[:, None] - tensor(f"y{slot}")[..., None, None]
        )
        radius = tensor(f"radius{slot}")[..., None, None]
        shape = tensor(f"shape{slot}", torch.long)[:, None, None, None]
        cover = (0.5 - signed_distance(shape, dx, dy, radius) / pixel).clamp(0, 1)
        if slot == 1:
            cover = cover * tensor("two")[:, None, None, None]
        video = torch.lerp(video, colour(f"colour{slot}"), cover[:, None])
    return video * 2 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    """(clips, 3, frames, height, width) in [-1, 1] to (clips, frames, height, width, 3) in [0, 1]."""
    return ((video.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy()


def _pattern(tensor, xs: torch.Tensor, ys: torch.Tensor, pixel: float) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The share of the background's first colour at each pixel, (clips, height, width)."""
    frequency, phase = tensor("frequency"), tensor("phase")
    kind = tensor("pattern", torch.long)[:, None, None]
    vertical = tensor("vertical", torch.long)[:, None, None] == 0
    sign = 1.0 - 2.0 * tensor("reversed")[:, None, None]

    def square_wave(coordinate: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        slope = 2 * math.pi * frequency[:, None]
        return (torch.sin(slope * coordinate + offset[:, None]) / (slope * pixel)).clamp(-1, 1)

    across = square_wave(xs, phase[:, 0])[:, None, :]
    along = square_wave(ys, phase[:, 1])[:, :, None]
    stripes = torch.where(vertical, across, along)
    checks = across * along
    ramp = torch.where(vertical, xs[None, None, :] / xs.abs().max(), ys[None, :, None] / ys.abs().max()) * sign
    plain = torch.ones_like(checks)
    wave = torch.where(kind == 0, plain, torch.where(kind == 1, stripes, torch.where(kind == 2, checks, ramp)))
    return wave * 0.5 + 0.5


def signed_distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to the outline (negative inside). Sizes are balanced so that the four shapes look equally large."""
    return torch.where(
        shape == 0,
        torch.hypot(x, y) - radius,
        torch.where(
            shape == 1,
            torch.maximum(x.abs(), y.abs()) - 0.87 * radius,
            torch.where(
                shape == 2, _triangle(x, y - 0.15 * radius, 1.05 * radius), _star(x, y - 0.05 * radius, 1.2 * radius)
            ),
        ),
    )


def _triangle(x: torch.Tensor, y: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Equilateral, tip up, `half` its half base: fold over the symmetry axes, then measure to the base."""
    root = math.sqrt(3.0)
    x, y = x.abs() - half, half / root - y
    fold = x + root * y > 0
    x, y = torch.where(fold, (x - root * y) / 2, x), torch.where(fold, (-root * x - y) / 2, y)
    x = x - torch.minimum(torch.maximum(x, -2 * half), torch.zeros_like(x))
    return -torch.hypot(x, y) * torch.sign(y)


def _star(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Five points, one up: fold the plane into a tenth of the star, then measure to its one edge."""
    inner = 0.45
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -y
    for fold_x in (cos, -cos):
        reach = (fold_x * x - sin * y).clamp(min=0)
        x, y = x - 2 * reach * fold_x, y + 2 * reach * sin
    x, y = x.abs(), y - radius
    edge_x, edge_y = inner * sin, inner * cos - 1.0
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(min=0)
    along = torch.minimum(along, radius)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)
