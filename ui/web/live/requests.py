"""What a live stream is asked for, as JSON values that a job keeps: from a program's query, and checked into a `StreamWork`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from tilewise.pipelines.conditioning.files import ROLES
from tilewise.pipelines.generation.settings import MAX_PROMPT, GenerateSettings, check_text
from tilewise.pipelines.loading.load import cast_skeleton
from tilewise.pipelines.options import options_of
from tilewise.pipelines.streaming.preparation import StreamWork, check_memory, prepare
from tilewise.pipelines.streaming.settings import StreamSettings
from tilewise.plugins.config import Config, presets, resolve
from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.methods.base import methods
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.jobs.models import Models

USUAL_SECONDS = 600.0
MOST_SECONDS = 3600.0
FRAMES_PER_LATENT = 4  # at most, of the models that stream
CLIP = options_of(GenerateSettings)
STREAM = {
    name: one
    for name, one in options_of(StreamSettings).items()
    if not one.names_file and name != "decode_device"  # what visitors may not say
}
SHARED = ("negative", "seed", "fps", "height", "width", "max_sequence_length")
"""Fields of a clip's settings that a stream has too, beside prompt, model, method and guidance."""


def asked_of(query: Mapping[str, str], models: Models) -> dict[str, Any]:
    """Values from the words of a query. Raises ConfigError for names and values that there are not."""
    known = {**{name: CLIP[name] for name in (*SHARED, "prompt", "model", "method", "guidance")}, **STREAM}
    said: dict[str, Any] = {}
    for name, text in query.items():
        if name not in known:
            raise unknown("option of a live stream", name, known)
        said[name] = known[name].parse(text, text=True)
    if "prompt" not in said:
        raise ConfigError("there is no prompt: say what the video should show, as in ?prompt=a+boat+on+a+lake")
    method = said.get("method", "dense")
    if method not in (*presets(), *methods()):
        raise ConfigError(f"there is no method or preset {str(method)[:80]!r} here")
    return asked(
        prompt=said["prompt"],
        model=said.get("model", models.names[0]),
        method=resolve(method),
        guidance=said.get("guidance"),
        shared={name: said[name] for name in SHARED if name in said},
        stream={name: said[name] for name in STREAM if name in said},
    )


def asked(
    *,
    prompt: str,
    model: str,
    method: Config,
    guidance: float | None,
    shared: Mapping[str, Any],
    stream: Mapping[str, Any],
) -> dict[str, Any]:
    """The values of a job. shared: of SHARED, and an image. stream: fields of `StreamSettings`."""
    return {
        "prompt": prompt, "model": model, "method": method.to_dict(), "guidance": guidance, "shared": dict(shared),
        "stream": {"seconds": USUAL_SECONDS, **stream},
    }  # fmt: skip


def work_of(values: Mapping[str, Any], models: Models, limits: Limits) -> StreamWork:
    """The checked stream of a job's values, which may come from an edited file.

    Raises ConfigError and UnsupportedModelError for what cannot be, RefusedError for a model that is not offered, for files that
    were not uploaded, work beyond the caps, and more memory than there is.
    """
    try:
        prompt, model, shared, stream = values["prompt"], str(values["model"]), values["shared"], values["stream"]
        method, guidance = Config.from_dict(values["method"]), values["guidance"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the settings of a live stream are incomplete: {str(error)[:80]}") from error
    check_prompt(prompt)
    for given, allowed in ((shared, (*SHARED, "image")), (stream, (*STREAM,))):
        if not isinstance(given, Mapping):
            raise ConfigError("the settings of a live stream are of another kind")
        for name in given:
            if name not in allowed:
                raise unknown("setting of a live stream", name, allowed)
    limits.check_files({role: shared.get(role) for role in ROLES if shared.get(role)})
    options = StreamSettings.from_dict(stream)
    if options.seconds is not None and options.seconds > MOST_SECONDS:
        raise RefusedError(f"a stream of this page has at most {MOST_SECONDS:,.0f} seconds, not {options.seconds:g}")
    skeleton = models.skeleton(model)
    limits.check_text_tokens(shared.get("max_sequence_length"))
    height, width = (shared.get(name) for name in ("height", "width"))
    limits.check_work(height or 1, width or 1, 1, 1)  # before anything is planned with it
    work = prepare(
        skeleton, prompt, options, model=model, method=method, guidance=guidance,
        **{name: value for name, value in shared.items() if value is not None},
    )  # fmt: skip
    settings = work.settings
    frames = min(settings.frames, work.recipe.window * FRAMES_PER_LATENT)
    limits.check_work(settings.height, settings.width, frames, settings.steps)
    try:
        check_memory(cast_skeleton(copy.deepcopy(skeleton), getattr(torch, models.dtype)), work, models.device)
    except ConfigError as error:
        raise RefusedError(str(error)) from error
    return work


def check_prompt(prompt: Any) -> None:
    """Raises ConfigError for a prompt that is none, RefusedError for one that is too long."""
    check_text("prompt", prompt)
    if not str(prompt).strip():
        raise ConfigError("the prompt is empty: say what the video should show")
    if len(prompt) > MAX_PROMPT:
        raise RefusedError(f"a prompt has at most {MAX_PROMPT:,} characters")
