"""Generate a clip with a method and with dense attention, and compare their speed and frames."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tilewise.pipelines.generation.generate import Clip, Progress, generate, refuse_patched, warm_up
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.quality.coherence import repetition
from tilewise.pipelines.quality.metrics import SMALLEST, psnr, ssim
from tilewise.plugins.config import resolve
from tilewise.plugins.errors import ConfigError

LABEL_HEIGHT = 16
GAP = 4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A sparse and a dense clip from the same seed.

    speedup: "denoise" and "total", dense seconds / sparse seconds; of several runs the median. runs: the same of each
    run. psnr: dB, infinite for identical clips. ssim: in [-1, 1], None for frames below 11 x 11 pixels. repetition: "sparse" and
    "dense", how much each clip shows the same thing several times (`coherence.repetition`): what a window makes of a large
    picture.
    """

    sparse: Clip
    dense: Clip
    speedup: dict[str, float]
    psnr: float
    ssim: float | None
    repetition: dict[str, float] = dataclasses.field(default_factory=dict)
    runs: tuple[dict[str, float], ...] = ()

    def speedup_words(self, phase: str) -> str:
        """The speed-up of "denoise" or "total" with the number of runs and their spread."""
        return speedup_words([run[phase] for run in self.runs] or [self.speedup[phase]])

    def __repr__(self) -> str:
        return f"Comparison({self.sparse!r}, {self.dense!r})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only, without the frames; psnr is null for identical clips, content for clips that were not scored."""
        return {
            "speedup": self.speedup,
            "runs": list(self.runs),
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "ssim": self.ssim,
            "repetition": self.repetition,
            "content": {"sparse": self.sparse.content, "dense": self.dense.content},
            "seconds": {"sparse": self.sparse.seconds, "dense": self.dense.seconds},
        }


def speedup_words(values: Sequence[float], of: str = "run") -> str:
    """ "1.73x (median of 3 runs, 1.60 to 1.90)", or "1.04x (one run)" for a single one. of: what was measured."""
    if len(values) == 1:
        return f"{values[0]:.2f}x (one {of})"
    spread = f"{min(values):.2f} to {max(values):.2f}"
    return f"{statistics.median(values):.2f}x (median of {len(values)} {of}s, {spread})"


def compare(pipe: Any, settings: GenerateSettings, progress: Progress | None = None, *, runs: int = 1) -> Comparison:
    """Generates with the method of `settings` and dense, from the same noise.

    runs: how often both are timed, one after the other in turn; the clips are of the first, as those of the others are the same.

    Timing is fair in that neither pays for being first: before the two measured runs, one denoising step of each is run
    and thrown away, at the full size (the dense one is decoded too). That loads libraries, compiles or picks kernels
    and fills the allocators' pools. Building the method's plan is part of the measured run: every real run has to.

    progress: called as in `generate`, with the phase named "dense: denoise" and the like; the warm-up is one phase.
    Raises ConfigError if the method itself is dense or there is no run, and whatever `generate` raises.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ConfigError(f"runs must be a whole number of at least 1, not {runs!r}")
    if settings.is_dense:
        raise ConfigError("comparing dense with dense says nothing; choose another method")
    refuse_patched(pipe)  # before the warm-up, which would run on the wrong method
    tell = progress or (lambda phase, done, total: None)
    name = settings.method.label
    reference = dataclasses.replace(settings, method=resolve("dense"))

    warm_up(pipe, settings, progress)

    pairs = []
    for number in range(1, runs + 1):
        which = f", run {number} of {runs}" if runs > 1 else ""
        first = generate(pipe, reference, lambda phase, *count, which=which: tell(f"dense: {phase}{which}", *count))
        second = generate(pipe, settings, lambda phase, *count, which=which: tell(f"{name}: {phase}{which}", *count))
        pairs.append((first, second))
    dense, sparse = pairs[0]
    times = tuple(
        {phase: a.seconds[phase] / max(b.seconds[phase], 1e-9) for phase in ("denoise", "total")} for a, b in pairs
    )
    large = min(sparse.frames.shape[1:3]) >= SMALLEST
    return Comparison(
        sparse,
        dense,
        {phase: statistics.median(run[phase] for run in times) for phase in ("denoise", "total")},
        psnr(sparse.frames, dense.frames),
        ssim(sparse.frames, dense.frames) if large else None,
        {"sparse": repetition(sparse.frames), "dense": repetition(dense.frames)},
        times,
    )


def side_by_side(a: NDArray[np.uint8], b: NDArray[np.uint8], labels: tuple[str, str] = ("", "")) -> NDArray[np.uint8]:
    """Two clips (T, H, W, 3) next to each other, a on the left: (T, H + 16, 2 W + 4, 3), with labels above them.

    Raises ValueError for clips of different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"the clips differ in shape: {a.shape} and {b.shape}")
    frames, height, width = a.shape[:3]
    sheet = np.zeros((frames, height + LABEL_HEIGHT, 2 * width + GAP, 3), np.uint8)
    sheet[:, LABEL_HEIGHT:, :width] = a
    sheet[:, LABEL_HEIGHT:, width + GAP :] = b
    header = Image.new("RGB", (sheet.shape[2], LABEL_HEIGHT))
    draw = ImageDraw.Draw(header)
    for left, label in zip((0, width + GAP), labels, strict=True):
        draw.text((left + 4, 2), label, fill=(235, 235, 235))
    sheet[:, :LABEL_HEIGHT] = np.asarray(header)
    return sheet
