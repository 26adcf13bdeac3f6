"""Score how often a frame repeats the same content, which is what fails past a model's training size.

    patch p of a frame (zero mean, unit norm)        best(p) = max of its normalised cross-correlation with the frame,
                                                               over all places at least a patch away from its own
    repetition = mean of best(p) over patches with structure and over frames,  in [0, 1]

Straight edges and patterns match themselves, so the number means little alone: what counts is how much higher it is than that
of the same scene at the model's native size (``coherence``). Both clips are measured at one size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d, conv2d, interpolate

SIDE = 96  # pixels of the shorter side at which clips are measured
PATCH = 24
STEP = 12
FRAMES = 4
MOST = 256  # patches of a frame: in a strip there are many more, and each is looked for in all of it
CHUNK = 32  # patches that are looked for at once
STRUCTURE = 0.02  # least standard deviation of a patch that can be recognised, of 0 … 1


@dataclasses.dataclass(frozen=True)
class Coherence:
    """repetition, native: the scores of a clip and of its native stage. excess: what it repeats more than that. sharpness: RMS
    gradient of the clip ÷ of the native stage scaled up to the same size; above 1 there is detail that scaling does not give.
    None where that stage is without any edge."""

    repetition: float
    native: float
    sharpness: float | None

    @property
    def excess(self) -> float:
        return self.repetition - self.native

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "excess": self.excess}

    def __str__(self) -> str:
        sharp = "" if self.sharpness is None else f"; sharpness {self.sharpness:.2f} × the native clip scaled up"
        return f"repetition {self.repetition:.3f}, native {self.native:.3f}: {self.excess:+.3f}{sharp}"


def coherence(frames: NDArray, native: NDArray) -> Coherence:
    """A clip (T, H, W, 3) against its native stage, uint8 or floats in 0 … 1; lengths may differ."""
    larger = _resized(_picked(native), frames.shape[1], frames.shape[2])
    blurred = gradient(larger)
    sharp = gradient(_picked(frames)) / blurred if blurred > 0 else None
    return Coherence(repetition(frames), repetition(native), sharp)


def repetition(frames: NDArray) -> float:
    """The score of a clip (T, H, W, 3), uint8 or floats in 0 … 1; 0 for one without structure.

    Raises:
        ValueError: for another shape, or an empty clip.
    """
    video = _picked(frames)
    height, width = video.shape[2:]
    scale = SIDE / min(height, width)
    video = _resized(video, max(SIDE, round(height * scale)), max(SIDE, round(width * scale)))
    scores = [score for frame in video if (score := _of_frame(frame)) is not None]
    return float(np.mean(scores)) if scores else 0.0


def gradient(video: torch.Tensor) -> float:
    """Root mean square difference of neighbouring pixels of (T, 3, H, W). Squares tell a sharp edge from a blurred one; the mean
    difference does not: both have the same height."""
    return float(((video.diff(dim=-1) ** 2).mean() + (video.diff(dim=-2) ** 2).mean()) ** 0.5)


def _of_frame(frame: torch.Tensor) -> float | None:
    """The score of one frame (3, H, W); None where no patch has structure."""
    count = 3 * PATCH**2
    patches = frame.unfold(1, PATCH, STEP).unfold(2, PATCH, STEP)  # (3, rows, columns, p, p)
    down, across = patches.shape[1:3]
    patches = patches.permute(1, 2, 0, 3, 4).reshape(down * across, 3, PATCH, PATCH)
    spread = patches.flatten(1).std(1, correction=0)
    y, x = torch.meshgrid(torch.arange(down) * STEP, torch.arange(across) * STEP, indexing="ij")
    good = spread > STRUCTURE
    if not bool(good.any()):
        return None
    chosen = good.nonzero()[:, 0]
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(MOST, len(chosen))).round().long()]  # evenly
    patches, y, x = patches[chosen], y.reshape(-1)[chosen], x.reshape(-1)[chosen]
    centred = patches - patches.mean((1, 2, 3), keepdim=True)
    templates = centred / centred.flatten(1).norm(dim=1)[:, None, None, None]
    mean = avg_pool2d(frame[None], PATCH, 1).mean(1)
    square = avg_pool2d(frame[None] ** 2, PATCH, 1).mean(1)
    norm = ((square - mean**2).clamp(min=0) * count).sqrt()  # of each window, its mean taken out
    flat, divisor = norm < STRUCTURE * count**0.5, norm.clamp(min=1e-6)
    at_y, at_x = torch.arange(norm.shape[1]), torch.arange(norm.shape[2])
    best = []
    for some, rows, columns in zip(templates.split(CHUNK), y.split(CHUNK), x.split(CHUNK), strict=True):
        # A template's mean is 0: the window's does not matter.
        found = (conv2d(frame[None], some)[0] / divisor).masked_fill(flat, 0)
        near_y, near_x = (at_y - rows[:, None]).abs() < PATCH, (at_x - columns[:, None]).abs() < PATCH
        best.append(found.masked_fill(near_y[:, :, None] & near_x[:, None, :], 0).flatten(1).max(1).values)
    return float(torch.cat(best).clamp(0, 1).mean())


def _picked(frames: NDArray) -> torch.Tensor:
    """A few frames, evenly spaced, as (n, 3, H, W) float32 in 0 … 1."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"a clip is (frames, height, width, 3), not {frames.shape}")
    chosen = frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)]
    video = torch.from_numpy(np.ascontiguousarray(chosen)).permute(0, 3, 1, 2).float()
    return video / 255 if frames.dtype == np.uint8 else video


def _resized(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tuple(video.shape[2:]) == (height, width):
        return video
    shrinks = height < video.shape[2] or width < video.shape[3]
    return interpolate(video, (height, width), mode="bicubic", antialias=shrinks, align_corners=False).clamp(0, 1)
