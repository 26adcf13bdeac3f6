"""`tilewise explain`: what a method would do with a model at a size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.generation.generate import run
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import DEFAULT_METHOD, DEFAULT_MODEL
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_pipeline, load_skeleton
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.memory.estimate import estimate_memory
from tilewise.pipelines.memory.fit import memory_words
from tilewise.pipelines.memory.units import gib
from tilewise.plugins.config import Config
from tilewise.plugins.context_parallel.ways import CONTEXT, token_parts
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.explain import Explanation, explain
from tilewise.plugins.methods.base import DynamicMethod
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of, patched
from tilewise.plugins.watch import watch
from tilewise.ui.cli.plot import Drawn, check_plot, plot
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.common.options import method_config, refuse_stream_options
from tilewise.ui.common.terminal import say, standard_error

# A dynamic method's picture comes from a short run: the third of four steps, when the clip has taken shape.
PLOT_STEPS, PLOT_STEP = 4, 2
PROMPT = "a red circle moving right on a blue striped background"


def explain_command(
    options: Mapping[str, Any],
    *,
    as_json: bool,
    gpus: int = 1,
    parallel: str = CONTEXT,
    picture: Path | None = None,
    force: bool = False,
) -> None:
    """Prints what a method would do with a model at a size, and draws it; a picture of a dynamic method runs the model.

    Raises ImportError for a picture without matplotlib, OutputPathError, and ConfigError where nothing would be sparse.
    """
    refuse_stream_options(options)
    if names := [name for name in ("guidance", "dtype", "decode") if name in options]:
        raise ConfigError(
            f"--{names[0]} says something of the memory of a stream alone: give --stream too, or leave it out"
        )
    if picture is not None:
        check_plot(picture, force=force)
    model = options.get("model", DEFAULT_MODEL)
    config = method_config(options.get("method", DEFAULT_METHOD), options)
    skeleton = load_skeleton(model)
    native = model_defaults(skeleton)
    explanation = explain(
        skeleton,
        height=options.get("height", native.height),
        width=options.get("width", native.width),
        frames=options.get("frames", native.frames),
        num_inference_steps=options.get("steps", native.steps),
        method=config,
        gpus=gpus,
        parallel=parallel,
    )
    say(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)
    if gpus > 1 and not as_json:
        dtype = resolve_dtype("auto", resolve_device("auto"))
        size = explanation.size
        settings = resolve_settings(
            skeleton, PROMPT, model=model, method=config, height=size["height"], width=size["width"],
            frames=size["frames"], steps=size["num_inference_steps"],
        )  # fmt: skip
        one, each = (
            estimate_memory(skeleton, settings, explanation, dtype, gpus=count)
            for count in (1, token_parts(gpus, parallel))
        )
        say(f"memory a GPU: about {gib(each.total)}, on one GPU {gib(one.total)} ({memory_words(each)})")
        for note in each.notes:
            say(f"note: {note}")
    if picture is not None:
        if isinstance(config.method, DynamicMethod):
            with quiet_libraries():
                drawn = _of_a_run(model, config, explanation)
        else:
            drawn = _of_the_plan(skeleton, config, explanation)
        plot(drawn, picture)
        if not as_json:
            say(f"wrote {picture}")


def _of_the_plan(skeleton: Any, config: Config, explanation: Explanation) -> Drawn:
    """A static method's plan, which is the same at every call."""
    _, denoiser = next(iter(denoisers_of(skeleton).items()))
    family = family_of(denoiser)
    assert family is not None
    size = Size(explanation.size["height"], explanation.size["width"], explanation.size["frames"])
    layer = family.layers(denoiser)[0]
    config = config.prepare(skeleton, denoiser)
    method = config.method
    layout = method.layout(config.kept(layer.grid(family.grid_of_size(denoiser, skeleton, size))))
    if layout is None:
        raise ConfigError(f"--plot: the method {method.name} is dense, there is nothing to draw")
    plan = method.plan(layout, layer.heads, torch.device("cpu"))
    return Drawn(layout, plan, 0, None, f"{method.name}, grid {layout.grid}, head 0: density {plan.density:.3f}")


def _of_a_run(model: str, config: Config, explanation: Explanation) -> Drawn:
    """What a dynamic method chose in the middle block of a short run."""
    notes = standard_error()
    with notes.status(f"loading {model} …"):
        pipe = load_pipeline(model)
    size = explanation.size
    config = dataclasses.replace(config, steps=(PLOT_STEP / PLOT_STEPS, 1.0), blocks=":")
    settings = resolve_settings(
        pipe, PROMPT, method=config, height=size["height"], width=size["width"], frames=size["frames"],
        steps=PLOT_STEPS,
    )  # fmt: skip
    family = family_of(next(iter(denoisers_of(pipe).values())))
    assert family is not None
    blocks = [layer.block for layer in family.layers(next(iter(denoisers_of(pipe).values())))]
    block = sorted(set(blocks))[len(set(blocks)) // 2]
    with (
        progress_bars(notes) as progress,
        patched(pipe, config),
        watch(pipe, layers=[block], steps=[PLOT_STEP]) as calls,
    ):
        run(pipe, settings, progress, decode=False)
    call = next((call for call in calls if call.plan is not None), None)
    if call is None or call.plan is None or call.layout is None:
        kinds = ", ".join(sorted({call.kind for call in calls})) or "none"
        raise ConfigError(
            f"--plot: there is nothing to draw: no call of block {block} ({kinds}) was sparse with its tokens in the order "
            "of the grid"
        )
    kept = float("nan") if call.plan.device_density is None else float(call.plan.device_density)
    where = (
        f"{config.method.name}, grid {call.layout.grid}, block {block}, step {PLOT_STEP + 1} of {PLOT_STEPS}, head 0"
    )
    draft = None if call.draft is None else call.draft[0, 0]
    return Drawn(call.layout, call.plan, 0, draft, f"{where}: density {kept:.3f} over all heads")
