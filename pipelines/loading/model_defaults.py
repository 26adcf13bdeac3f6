"""Default size and settings of a model."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.latent_spaces.base import latent_spaces
from tilewise.pipelines.loading.model_folder import find_model, read_json
from tilewise.plugins.diffusers_compat import is_enabled
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.denoisers import find_denoisers
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.native_size import (
    NATIVE_FILE,
    call_parameters,
    current_names,
    native_file,
    native_pixels,
    usual_frames,
)
from tilewise.plugins.text_format import counted

FPS = 16  # Wan's, which says none itself
WAN_FLOW_SHIFT = 9.0
# Of a second stage, where the schedule is such that the usual share would leave next to nothing of the first: the first half of
# Mochi's steps is above a noise level of 0.975, whatever their number, and 0.45 of them begin at 0.96.
STRENGTHS = {"MochiPipeline": 0.45}
LEAST_STEPS = {"MochiPipeline": 2}  # half of its schedule is another than the rest
PAST = 1.5  # times the model's own side length: from here on a stock clip is likely to suffer
FLOATS = ("guidance", "fps", "highres_strength", "highres_flow_shift")


@dataclasses.dataclass(frozen=True)
class ModelDefaults:
    """Defaults for generating with a model.

    height, width: pixels. frames: length of the clip. steps: denoising steps. guidance: classifier-free guidance
    scale (1 is none). fps: frames a second on playback. max_sequence_length: text tokens, None for the pipeline's own.
    highres_strength, highres_flow_shift: of `highres`'s second stage, FreeSwim's (arXiv 2511.14712) where a model says nothing
    else; its shift is for Wan, other models keep their scheduler's own (None).
    one_shape: whether the model draws well at its own shape alone, so that another is stretched from it.
    clean_frames: latent frames in front of a clip that the model was trained to go on from; 0: nothing is known.
    world: "shapes" if the model draws the small world that `clip_content` can read back, else None.
    """

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    fps: float
    max_sequence_length: int | None = None
    world: str | None = None
    highres_strength: float = 0.7
    highres_flow_shift: float | None = None
    one_shape: bool = False
    clean_frames: int = 0

    @property
    def num_frames(self) -> int:
        """``frames`` by its old name, until the next release."""
        return self.frames


FIELDS = tuple(field.name for field in dataclasses.fields(ModelDefaults))


def model_defaults(pipe: Any) -> ModelDefaults:
    """The defaults of a loaded pipeline: from tilewise.json in its folder if there is one, else its own signature's.

    tilewise.json lies beside model_index.json; any of ModelDefaults's fields may be given there, the rest come from the
    signature. Raises ModelError, naming the file, for fields that are unknown or not positive numbers.
    """
    return ModelDefaults(**{**_signature_defaults(pipe), **stated_defaults(native_file(pipe))})


def folder_defaults(model: str | Path) -> ModelDefaults | None:
    """`model_defaults` of a model whose folder states them all, as the bundled one does; None where a pipeline must be asked.

    Reads that one file, without diffusers. Raises ModelError as `model_defaults`, and where there is no such model.
    """
    source = find_model(model)
    stated = stated_defaults(source / NATIVE_FILE) if isinstance(source, Path) else {}
    return ModelDefaults(**stated) if len(stated) == len(FIELDS) else None


def stated_defaults(file: Path) -> dict[str, Any]:
    """Those fields of ModelDefaults that a tilewise.json states, checked; none where there is no such file."""
    fields: dict[str, Any] = {}
    try:
        told = current_names(read_json(file)) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error
    for name, value in told.items():
        if name not in FIELDS:
            raise ModelError(f"{file}: unknown field {name!r}; it may hold {', '.join(FIELDS)}")
        if name == "world":
            fields[name] = str(value)
            continue
        if name == "one_shape":
            if not isinstance(value, bool):
                raise ModelError(f"{file}: one_shape must be true or false, not {value!r}")
            fields[name] = value
            continue
        number = float if name in FLOATS else int
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value <= 0 or number(value) != value:
            raise ModelError(f"{file}: {name} must be a positive {number.__name__}, not {value!r}")
        fields[name] = number(value)
    return fields


def _signature_defaults(pipe: Any) -> dict[str, Any]:
    parameters = call_parameters(pipe)

    def default(name: str, fallback: Any) -> Any:
        value = parameters[name].default if name in parameters else None
        return fallback if value is None or value is inspect.Parameter.empty else value

    try:
        size = native_pixels(pipe)
    except ConfigError:
        size = Size(480, 832, default("num_frames", usual_frames(pipe)))
    guider = guider_of(pipe)
    usual = 1.0 if not takes_guidance(pipe) else 5.0 if guider is None else guider.guidance_scale
    return {
        "height": size.height,
        "width": size.width,
        "frames": size.frames,
        "steps": default("num_inference_steps", 50),
        "guidance": float(default("guidance_scale", default("true_cfg_scale", usual))),
        "fps": float(default("frame_rate", FPS)),
        "max_sequence_length": default("max_sequence_length", None),
        "world": None,
        "one_shape": False,
        "clean_frames": 0,
        "highres_strength": STRENGTHS.get(type(pipe).__name__, ModelDefaults.highres_strength),
        "highres_flow_shift": WAN_FLOW_SHIFT if type(pipe).__name__.startswith("Wan") else None,
    }


def least_steps(pipe: Any) -> int:
    """The fewest steps that a pipeline can be called with."""
    return LEAST_STEPS.get(type(pipe).__name__, 1)


def guider_of(pipe: Any) -> Any:
    """What holds a pipeline's guidance scale where its call takes none (HunyuanVideo 1.5); else None."""
    guider = getattr(pipe, "guider", None)
    given = "guidance_scale" in call_parameters(pipe)
    # A guider that is off has one forward; others have several scales, or names of their own.
    able = is_enabled(guider) and "guidance_scale" in getattr(guider, "config", {})
    return guider if able and not given else None


def takes_guidance(pipe: Any) -> bool:
    """Whether there is anything that a guidance scale can be given to."""
    return bool({"guidance_scale", "true_cfg_scale"} & set(call_parameters(pipe))) or guider_of(pipe) is not None


def size_notes(pipe: Any, height: int, width: int, frames: int | None = None) -> list[str]:
    """What a size past the model's own will look like, for models that `highres` serves; any other size than its own, for the
    bundled model and those like it, which know one alone."""
    native = model_defaults(pipe)
    own, asked = (native.height, native.width, native.frames), (height, width, frames or native.frames)
    if native.world is not None and asked != own:
        sizes = [f"{w}×{h} with {counted(t, 'frame')}" for h, w, t in (asked, own)]
        return [
            f"{sizes[0]} is not this model's own size: it was trained at {sizes[1]} alone, and what it draws at another one "
            "says little about the method"
            + (highres_hint(pipe) if max(height / own[0], width / own[1]) >= PAST else "")
        ]
    past = max(height / native.height, width / native.width)
    if past < PAST or not (hint := highres_hint(pipe)):
        return []
    return [
        f"{width}×{height} is {past:.3g} times as long as the {native.width}×{native.height} that the model was "
        f"trained at, where it may blur or show things twice{hint}"
    ]


def highres_hint(pipe: Any) -> str:
    """What to try for a size past the model's own; nothing for models that `highres` does not serve."""
    if type(pipe).__name__ in latent_spaces():
        return "; --highres makes such a clip by two stages"
    return "; --highres, or --method hidiffusion, is made for such sizes" if takes_hidiffusion(pipe) else ""


def takes_hidiffusion(pipe: Any) -> bool:
    """Whether a pipeline's denoiser is a UNet that the preset ``hidiffusion`` serves."""
    return any(type(one).__name__ == "UNet2DConditionModel" for one in find_denoisers(pipe).values())
