"""Pairs of clips from the same noise, one dense and one by a method: made, measured, and kept until all are there."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tilewise.pipelines.generation.clip_metadata import frames_sha256
from tilewise.pipelines.generation.generate import Clip, Progress, content_score, generate
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.verification.measures import Lpips, differences
from tilewise.plugins.config import resolve

STILL = 256  # pixels, the longer side
STRONGER = 4  # how much differences are amplified in their picture


@dataclasses.dataclass(frozen=True)
class Pair:
    """What was measured, JSON values only, and pictures of it.

    stills: "dense", "sparse" and "difference", each of the first, middle and last frame, JPEG in base64.
    """

    found: dict[str, Any]
    stills: dict[str, list[str]]


def make_pair(
    pipe: Any,
    settings: GenerateSettings,
    *,
    dense_first: bool,
    lpips: Lpips | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Both clips of a prompt and seed, and what they differ by.

    dense_first: which one is made first; taking turns, neither gains from what a machine does over time.
    Raises as `generate`.
    """
    tell = progress or (lambda phase, done, total: None)
    both = {"dense": dataclasses.replace(settings, method=resolve("dense")), "sparse": settings}
    names = {"dense": "dense", "sparse": settings.method.label}
    clips: dict[str, Clip] = {}
    for which in ("dense", "sparse") if dense_first else ("sparse", "dense"):
        clips[which] = generate(
            pipe, both[which], lambda phase, *count, which=which: tell(f"{names[which]}: {phase}", *count)
        )
    dense, sparse = clips["dense"], clips["sparse"]
    report = sparse.summary
    found = {
        "prompt": settings.prompt,
        "negative": settings.negative,
        "seed": settings.seed,
        **differences(sparse.frames, dense.frames, lpips),
        "seconds": {which: clip.seconds for which, clip in clips.items()},
        "density": 1.0 if report is None else report.density,
        "cost": 1.0 if report is None else report.cost,
        "fallbacks": {} if report is None else dict(report.fallbacks),
        "content": {which: content_score(pipe, settings, clip.frames) for which, clip in clips.items()},
        "frames_sha256": {which: frames_sha256(clip.frames) for which, clip in clips.items()},
    }
    return Pair(found, stills(dense.frames, sparse.frames))


def stills(dense: NDArray[np.uint8], sparse: NDArray[np.uint8]) -> dict[str, list[str]]:
    """Pictures of a pair, (T, H, W, 3) each: see `Pair`. Differences are around grey, and amplified."""
    numbers = list(dict.fromkeys((0, len(dense) // 2, len(dense) - 1)))
    away = [128 + STRONGER * (sparse[n].astype(np.int16) - dense[n]) for n in numbers]
    return {
        "dense": [_jpeg(dense[n]) for n in numbers],
        "sparse": [_jpeg(sparse[n]) for n in numbers],
        "difference": [_jpeg(frame.clip(0, 255).astype(np.uint8)) for frame in away],
    }


def _jpeg(frame: NDArray[np.uint8]) -> str:
    picture, out = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((STILL, STILL))
    picture.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def verify_pairs(
    pipe: Any,
    jobs: Sequence[GenerateSettings],
    *,
    kept: KeptResults | None = None,
    lpips: Lpips | None = None,
    progress: Progress | None = None,
) -> list[Pair]:
    """A pair for each of the settings; those that are kept are not made again.

    progress: as of `make_pair`, and with the phase "pairs".
    """
    tell = progress or (lambda phase, done, total: None)
    pairs: list[Pair] = []
    tell("pairs", 0, len(jobs))
    for number, settings in enumerate(jobs):
        pair = None if kept is None else _pair(kept.read(settings))
        if pair is None:
            pair = make_pair(pipe, settings, dense_first=number % 2 == 0, lpips=lpips, progress=progress)
            if kept is not None:
                kept.keep(settings, dataclasses.asdict(pair))
        pairs.append(pair)
        tell("pairs", number + 1, len(jobs))
    return pairs


def _pair(kept: Any) -> Pair | None:
    """A kept pair; None for what is none."""
    whole = isinstance(kept, dict) and set(kept) == {"found", "stills"}
    return Pair(kept["found"], kept["stills"]) if whole else None
