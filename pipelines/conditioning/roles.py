"""Which files a pipeline takes beside the prompt, and as which arguments of its call: read from its signature."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Collection
from typing import Any

from tilewise.pipelines.conditioning.files import flag
from tilewise.pipelines.errors import SetupError
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.native_size import call_parameters
from tilewise.plugins.text_format import counted

ARGUMENTS = {
    "image": ("image",),
    "last_image": ("last_image",),
    "video": ("video",),
    "mask": ("mask", "mask_image"),
    "reference": ("reference_images", "image_reference"),
}
CONDITIONS = "conditions"  # LTX: a list of pictures and videos with their places in the clip
OF_CONDITIONS = ("image", "last_image", "video")
# Whose `image` is a list of any pictures that the prompt speaks of.
MANY_IMAGES = (
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "Flux2KleinKVPipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
)
# Whose `image` is read at a size of its own, so that nothing of it need be cut off; HunyuanVideo 1.5 sizes the clip by it.
OWN_SIZE = (
    *MANY_IMAGES,
    "FluxKontextPipeline",
    "QwenImageEditPipeline",
    "Kandinsky5I2IPipeline",
    "HunyuanVideo15ImageToVideoPipeline",
)
# Whose `video` goes over the whole clip, although their call takes a number of frames; that of others is continued.
WHOLE_CLIP = ("WanVACEPipeline", "LucyEditPipeline")
TENSORS = (
    "EasyAnimateControlPipeline",
    "EasyAnimateInpaintPipeline",
)  # whose videos are tensors of a form of their own
# What cannot do without, by the class's name: diffusers gives many of them a default of None, and fails on it.
NEEDS = {"image": r"ImageToVideo|Img2Img|Inpaint|ImageEdit(?!Plus)|FluxFill", "video": r"VideoToVideo|LucyEdit"}
NEEDS["mask"] = r"Inpaint|FluxFill"


def roles_of(pipe: Any) -> dict[str, str]:
    """The roles of `ROLES` that a pipeline takes, with the name of its call's argument for each."""
    name, parameters = type(pipe).__name__, call_parameters(pipe)
    if name in TENSORS:
        return {}
    if CONDITIONS in parameters:
        return dict.fromkeys(OF_CONDITIONS, CONDITIONS)
    found = {role: next((one for one in names if one in parameters), None) for role, names in ARGUMENTS.items()}
    if name in MANY_IMAGES:
        found["reference"] = "image"
    return {role: argument for role, argument in found.items() if argument is not None}


def needed_roles(pipe: Any) -> list[str]:
    """Roles that a pipeline's call cannot do without."""
    parameters = call_parameters(pipe)
    return [
        role
        for role, argument in roles_of(pipe).items()
        if argument != CONDITIONS
        and (parameters[argument].default is parameters[argument].empty or _named(pipe, NEEDS.get(role)))
    ]


def takes_strength(pipe: Any) -> bool:
    """Whether a pipeline's call takes how far it goes from what it is given."""
    return bool({"strength", CONDITIONS} & set(call_parameters(pipe)))


def share_of_steps(pipe: Any, strength: float | None) -> float | None:
    """The share of the steps that a pipeline runs, where it leaves out the first ones; else None. strength: None for its own."""
    parameters = call_parameters(pipe)
    if "strength" not in parameters or CONDITIONS in parameters or not hasattr(pipe, "get_timesteps"):
        return None
    share = parameters["strength"].default if strength is None else strength
    return float(share)


def covers_clip(pipe: Any) -> bool:
    """Whether a pipeline's `video` goes over the whole clip, and is not continued by it."""
    return "num_frames" not in call_parameters(pipe) or type(pipe).__name__ in WHOLE_CLIP


def of_own_size(pipe: Any) -> bool:
    """Whether a pipeline reads its `image` at a size of its own."""
    return type(pipe).__name__ in OWN_SIZE


def check_roles(pipe: Any, given: Collection[str], strength: float | None, steps: int) -> None:
    """Raises ConfigError for files and a strength that a pipeline does not take or cannot do without, SetupError for a library
    that it lacks.

    given: roles. steps: denoising steps.
    """
    name, taken = type(pipe).__name__, roles_of(pipe)
    told = " and ".join(filter(None, [", ".join(map(flag, list(taken)[:-1])), *map(flag, list(taken)[-1:])]))
    for role in given:
        if role not in taken:
            instead = f"it takes {told}" if taken else "it makes clips from text alone"
            raise ConfigError(f"{flag(role)} is not for this {name}: {instead}")
    for role in needed_roles(pipe):
        if role not in given:
            raise ConfigError(f"{name} needs a file for {flag(role)}: it takes {told}")
    if "mask" in given and not {"image", "video"} & set(given):
        raise ConfigError(f"--mask says which part of a picture or video is made anew: give {told} with it")
    if strength is not None and not takes_strength(pipe):
        raise ConfigError(
            f"--strength is not for this {name}: its call takes none (with --highres it is the second stage's)"
        )
    share = share_of_steps(pipe, strength)
    if share is not None and int(steps * share) < 1:
        raise ConfigError(
            f"strength {share:g} of {counted(steps, 'step')} leaves none to run: give a larger strength, or more steps"
        )
    if CONDITIONS in call_parameters(pipe) and {"image", "video"} <= set(given):
        raise ConfigError(f"--image and --video both begin the clip of this {name}: give one of them")
    _check_last_image(pipe, given)
    _check_cleaning(pipe)


def _check_last_image(pipe: Any, given: Collection[str]) -> None:
    """What Wan's pipeline says nothing of: whether its denoiser was made for a last picture."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    name, asked = type(pipe).__name__, "last_image" in given
    if name != "WanImageToVideoPipeline" or config is None:
        return
    both = getattr(config, "pos_embed_seq_len", None) is not None
    if asked and (pipe.config.expand_timesteps or (config.image_dim is not None and not both)):
        raise ConfigError("--last-image is not for these weights: they were trained with a first picture alone")
    if both and not asked:
        raise ConfigError("these weights were trained with a first and a last picture: give --last-image too")


def _check_cleaning(pipe: Any) -> None:
    """Wan's pipelines for pictures and videos clean prompts with ftfy, and fail with a NameError where there is none."""
    if "encode_prompt" in vars(pipe):  # replaced on this pipeline: it may need no cleaning
        return
    module = sys.modules[type(pipe).__module__]
    source = getattr(module, "basic_clean", None)
    calls = (
        source is not None
        and "ftfy" in source.__code__.co_names
        and "is_ftfy_available" not in source.__code__.co_names
    )
    if calls and not hasattr(module, "ftfy") and importlib.util.find_spec("ftfy") is None:
        raise SetupError(f"{type(pipe).__name__} cleans prompts with ftfy, which is not installed: pip install ftfy")


def _named(pipe: Any, pattern: str | None) -> bool:
    return pattern is not None and re.search(pattern, type(pipe).__name__) is not None
