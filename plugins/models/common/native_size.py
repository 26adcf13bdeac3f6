"""The size that a model was trained at, in tokens, for methods that extrapolate from it.

Looked up in this order: ``tilewise.json`` beside the model's ``model_index.json``, the
defaults of the pipeline's call, the pipeline's ``default_sample_size``, or the attributes that it has in place of one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.diffusers_compat import source_of
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of

NATIVE_FILE = "tilewise.json"
OLD_NAMES = {"num_frames": "frames"}
VIDEO_FRAMES = 81
USUAL_STEPS = 50
# (height, width) of pipelines that have their default in the code of their call alone.
IN_THE_CODE = {"ZImagePipeline": (1024, 1024)}


def native_file(pipe: Any) -> Path:
    """Where a pipeline's ``tilewise.json`` lies, if it has one: beside its ``model_index.json``."""
    return Path(source_of(pipe)) / NATIVE_FILE


def current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``tilewise.json`` says by today's names; those of before are read until the next release.

    Raises ValueError for a field by both names.
    """
    named = {OLD_NAMES.get(name, name): value for name, value in fields.items()}
    for old, new in OLD_NAMES.items():
        if old in fields and new in fields:
            raise ValueError(f"{old} is the old name of {new}: give {new} alone")
    return named


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def native_pixels(pipe: Any) -> Size:
    """Height, width and frames that a pipeline makes by default; one frame for images.

    Raises:
        ConfigError: if neither the model nor its pipeline says a height and width.
    """
    defaults = {name: p.default for name, p in call_parameters(pipe).items() if isinstance(p.default, int)}
    found = {**{name: defaults.get(name) for name in ("height", "width")}, "frames": defaults.get("num_frames")}
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None and hasattr(pipe, "unet"):
        sample = getattr(getattr(pipe.unet, "config", None), "sample_size", None)
    if isinstance(sample, int) and found["height"] is None:
        side = sample * getattr(pipe, "vae_scale_factor", 8)
        found.update(height=side, width=side)
    if found["height"] is None and found["width"] is None:
        found.update(zip(("height", "width"), _usual_size(pipe), strict=True))
    file = native_file(pipe)
    if file.is_file():
        try:
            told = current_names(json.loads(file.read_text("utf-8")))
            found.update({name: value for name, value in told.items() if name in found})
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{file}: cannot be read for the model's native size: {error}") from error
    if found["height"] is None or found["width"] is None:
        raise ConfigError(
            f"{type(pipe).__name__} does not say at which size its model was trained; give it, for instance "
            "tilewise.patch(pipe, tilewise.Inward(native=(h, w))), in tokens of the denoiser's grid"
        )
    return Size(found["height"], found["width"], found["frames"] or usual_frames(pipe))


def _usual_size(pipe: Any) -> tuple[int | None, int | None]:
    """(height, width) by attributes of a pipeline's own; None where it has none."""
    if hasattr(pipe, "default_aspect_ratio"):  # HunyuanVideo 1.5: of the side that its transformer was trained at
        w, h = pipe.default_aspect_ratio
        height, width = pipe.video_processor.calculate_default_height_width(h, w, pipe.target_size)
        return int(height), int(width)
    usual = IN_THE_CODE.get(type(pipe).__name__, (None, None))
    return getattr(pipe, "default_height", usual[0]), getattr(pipe, "default_width", usual[1])


def usual_frames(pipe: Any) -> int:
    """Frames of a clip where neither the model nor its pipeline's call says how many: 1 where the call takes no number."""
    return VIDEO_FRAMES if "num_frames" in call_parameters(pipe) else 1


def usual_steps(target: Any) -> int:
    """Denoising steps that a pipeline takes by default: its model's ``tilewise.json``, or its call; 50 where neither says."""
    if isinstance(target, nn.Module):
        return USUAL_STEPS
    file = native_file(target)
    try:
        told = json.loads(file.read_text("utf-8")).get("steps") if file.is_file() else None
    except (OSError, ValueError, AttributeError):
        told = None  # whoever needs the file says what is wrong with it
    if isinstance(told, int) and told > 0:
        return told
    parameter = call_parameters(target).get("num_inference_steps")
    usual = None if parameter is None else parameter.default
    return usual if isinstance(usual, int) else USUAL_STEPS


def native_grid(pipe: Any, denoiser: nn.Module) -> Grid:
    """The token grid of a denoiser at the size that it was trained at.

    Raises:
        ConfigError: for a bare denoiser, or a pipeline that says no size or one that its denoiser does not take.
    """
    if pipe is denoiser or isinstance(pipe, nn.Module):
        raise ConfigError(
            f"a bare {type(denoiser).__name__} does not say at which size it was trained: give native=(h, w) in tokens, or "
            "patch the pipeline"
        )
    family = family_of(denoiser)
    if family is None:
        raise ConfigError(f"{type(denoiser).__name__}: no family adapter serves it, so its token grid is unknown")
    return family.grid_of_size(denoiser, pipe, native_pixels(pipe))
