"""Call a stock pipeline with `GenerateSettings` and the files that they name, mapped to the arguments that it takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeAlias

import torch

from tilewise.pipelines.conditioning.inputs import Inputs, files_of, input_arguments
from tilewise.pipelines.conditioning.roles import check_roles, roles_of
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.model_defaults import guider_of, takes_guidance
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.models.common.native_size import call_parameters
from tilewise.plugins.patching import denoisers_of

StepDone: TypeAlias = Callable[[int, int, torch.Tensor], None]
"""Called as done(steps done, of how many, latents) after each denoising step, with the latents as the pipeline holds them."""


def stock_call(pipe: Any, settings: GenerateSettings, done: StepDone, **more: Any) -> Any:
    """What the pipeline makes of the settings: a batch of one. more: arguments of its call beside them.

    If it is cut off, nothing that it had begun stays on the GPU. Raises as `call_arguments`, before anything runs.
    """
    arguments = {**call_arguments(pipe, settings, more), **input_arguments(pipe, Inputs.of(settings)), **more}
    arguments["return_dict"] = False
    if "callback_on_step_end" in call_parameters(pipe):

        def step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done(step + 1, _steps(pipe), tensors["latents"])
            return tensors

        arguments["callback_on_step_end"] = step_end
        told: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:  # HunyuanVideo 1.5's call has none, nor PixArt's
        told = _told_by_scheduler(pipe, done)
    with told, _guided(pipe, settings.guidance), nothing_left(pipe):
        return pipe(**arguments)[0]


@contextlib.contextmanager
def nothing_left(pipe: Any) -> Iterator[None]:
    """Run a block after which, if it is cut off, nothing stays on the GPU of what a pipeline's parts had begun."""
    try:
        yield
    except BaseException:
        pipe.maybe_free_model_hooks()  # with CPU offload, the part that was running would stay
        if hasattr(getattr(pipe, "vae", None), "clear_cache"):
            pipe.vae.clear_cache()  # what a video VAE keeps between the frames of a decode
        raise


def call_arguments(pipe: Any, settings: GenerateSettings, beside: Collection[str] = ()) -> dict[str, Any]:
    """The settings as arguments of the pipeline's call, without its files (`input_arguments`).

    beside: names of arguments that are given besides, in place of files.

    Raises:
        UnsupportedModelError: if it demands more than settings can say.
        ConfigError: for guidance where nothing takes it, and for files that the pipeline does not take or needs.
    """
    parameters = call_parameters(pipe)
    arguments = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator("cpu").manual_seed(settings.seed),
        "max_sequence_length": settings.max_sequence_length,
    }
    if guided_by_two_forwards(pipe):
        arguments["true_cfg_scale"] = settings.guidance
    demanded = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    extra = [name for name in demanded if name not in ("self", *arguments, *roles_of(pipe).values())]
    if extra:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} also needs {', '.join(extra)}, for which there is no option. "
            "Call the pipeline yourself, after tilewise.patch(pipe, ...)"
        )
    given = [*files_of(vars(settings)), *(role for role, name in roles_of(pipe).items() if name in beside)]
    check_roles(pipe, given, settings.strength, settings.steps)
    if settings.guidance > 1 and not takes_guidance(pipe):
        guider = getattr(pipe, "guider", None)
        why = "its call has no guidance_scale" + (
            "" if guider is None else f", and its {type(guider).__name__} takes none"
        )
        raise ConfigError(
            f"guidance {settings.guidance:g} is not for this {type(pipe).__name__}: {why}. Give guidance=1"
        )
    return {name: value for name, value in arguments.items() if name in parameters and value is not None}


def guided_by_two_forwards(pipe: Any) -> bool:
    """Whether a pipeline's guidance goes by another name: ``guidance_scale`` is there an input of distilled denoisers, which this
    one has not (Qwen-Image). Pipelines that have both names and leave the second forward off by default keep it off (Flux)."""
    parameter = call_parameters(pipe).get("true_cfg_scale")
    usual = None if parameter is None else parameter.default
    return isinstance(usual, int | float) and usual > 1 and not guidance_is_an_input(pipe)


def guidance_is_an_input(pipe: Any) -> bool:
    """Whether a denoiser has guidance as an input, and no second forward for it (distilled: Flux, HunyuanVideo)."""
    return any(getattr(denoiser.config, "guidance_embeds", False) for denoiser in denoisers_of(pipe).values())


def _steps(pipe: Any) -> int:
    """Of the run that is under way."""
    return getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)


def _guided(pipe: Any, guidance: float) -> contextlib.AbstractContextManager[None]:
    """For a block with this guidance where it is no argument of the call."""
    guider = guider_of(pipe)
    return (
        contextlib.nullcontext()
        if guider is None
        else temporary_attribute(pipe, "guider", guider.new(guidance_scale=guidance))
    )


@contextlib.contextmanager
def _told_by_scheduler(pipe: Any, done: StepDone) -> Iterator[None]:
    """Run a block with ``done`` called after each step of the pipeline's scheduler."""
    whole, count = pipe.scheduler.step, 0

    @functools.wraps(whole)  # pipelines look at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        out = whole(*args, **kwargs)
        count += 1
        done(count, _steps(pipe), out[0])
        return out

    with temporary_attribute(pipe.scheduler, "step", step):
        yield
