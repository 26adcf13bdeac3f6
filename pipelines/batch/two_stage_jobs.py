"""Plan the two-stage clips of a batch: `highres.prepare` for input lines and for jobs.

line → prepare(skeleton) → Work → Job           while the input is read: sizes, options, memory as far as it is known
job  → prepare(pipeline) → Work                 once the model is loaded, and before its first clip: memory with all of it
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewise.pipelines.batch.estimate import denoising_flop
from tilewise.pipelines.batch.job import Job, Stages
from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.highres.preparation import SHARED_BY_STAGES, Work, prepare
from tilewise.pipelines.highres.settings import HighresSettings, steps_to_run
from tilewise.pipelines.loading.load import cast_skeleton
from tilewise.pipelines.options import field_values, parse_size
from tilewise.plugins.config import Config, resolve
from tilewise.plugins.errors import ConfigError


def plan_fields(
    skeleton: Any,
    fields: Mapping[str, Any],
    *,
    method: Config,
    dtype: str,
    device: torch.device,
) -> Work:
    """What the fields of a line ask for, of any prompt and seed.

    skeleton: of the model; it is copied. method: of the first stage. dtype: of the weights, "float32" and the like. device: where
    it will run. Raises as `prepare` does, and ConfigError for fields without the clip's size.
    """
    missing = [name for name in ("height", "width") if name not in fields]
    if missing:
        raise ConfigError(f"highres needs the size to make the clip at: {' and '.join(missing)} missing")
    native = parse_size(fields["native"]) if "native" in fields else None
    options = HighresSettings(**field_values(HighresSettings, fields))
    shared = {name: fields[name] for name in SHARED_BY_STAGES if name in fields and name not in ("negative", "seed")}
    cast = cast_skeleton(copy.deepcopy(skeleton), getattr(torch, dtype))
    return prepare(cast, "?", fields["height"], fields["width"], native, method, options, shared, device)


def stages_of(work: Work) -> Stages:
    """What a job keeps of it, beside the target's settings."""
    return Stages(work.native.height, work.native.width, work.native.method, work.options)


def plan_job(pipe: Any, job: Job) -> Work:
    """A job's plan with the loaded pipeline; raises as `prepare` does."""
    settings, stages = job.settings, job.highres
    assert stages is not None
    shared = {name: getattr(settings, name) for name in SHARED_BY_STAGES}
    native = (stages.height, stages.width)
    size = (settings.height, settings.width)
    return prepare(pipe, settings.prompt, *size, native, stages.method, stages.options, shared)


def about(work: Work, settings: GenerateSettings) -> Work:
    """A plan for jobs of one shape, for the prompt and seed of one of them, whose settings are given."""
    said = {name: getattr(settings, name) for name in ("prompt", "negative", "seed")}
    return dataclasses.replace(work, native=dataclasses.replace(work.native, **said), target=settings)


def stages_flop(skeleton: Any, work: Work) -> float:
    """Estimated operations of both stages' denoising; a full path by draft or pooled counts as a dense one."""

    def flop(settings: GenerateSettings) -> float:
        return denoising_flop(skeleton, settings, explain_settings(skeleton, settings))

    options = work.options
    assert options.strength is not None
    window = dataclasses.replace(work.target, steps=steps_to_run(work.target.steps, options.strength))
    total = flop(work.native) + flop(window)
    if options.global_path == "none":
        return total
    guidance = 1.0 if options.guided == "cond" else window.guidance
    refreshed = math.ceil(window.steps / options.refresh)
    full = dataclasses.replace(window, method=resolve("dense"), steps=refreshed, guidance=guidance)
    return total + flop(full)
