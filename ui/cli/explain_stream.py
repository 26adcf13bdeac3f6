"""`tilewise explain --stream`: what a stream would do in its window, and its memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.settings import DEFAULT_MODEL, OWN_VAE
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import cast_skeleton, load_skeleton
from tilewise.pipelines.options import field_values
from tilewise.pipelines.streaming.checks import cache_of
from tilewise.pipelines.streaming.explain import explain_stream
from tilewise.pipelines.streaming.preparation import recipe_for
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.settings import StreamSettings, not_of_streams, stream_window
from tilewise.plugins.errors import ConfigError
from tilewise.ui.common.options import method_config
from tilewise.ui.common.terminal import say


def explain_stream_command(options: Mapping[str, Any], *, as_json: bool, picture: Path | None = None) -> None:
    """Prints what a stream would do. Raises ConfigError for options that say nothing of one, and as `prepare` does."""
    if picture is not None:
        raise ConfigError("--plot draws the plan of a clip; leave --stream out")
    for name, reason in not_of_streams(options).items():
        if name in options:
            raise ConfigError(f"--{name} cannot be used with --stream: {reason}")
    device = resolve_device("auto")
    named = dict(options)
    if "window" in named:
        named["window"] = stream_window(named["window"])
    of_method = {name: value for name, value in options.items() if name != "window"}  # which is the stream's
    asked = StreamSettings(**field_values(StreamSettings, named))
    model = options.get("model", DEFAULT_MODEL)
    skeleton = cast_skeleton(load_skeleton(model), resolve_dtype(options.get("dtype", "auto"), device))
    recipe, _ = recipe_for(skeleton, asked, model=model, guidance=options.get("guidance"))
    explanation = explain_stream(
        skeleton,
        recipe=recipe,
        cache=cache_of(recipe, asked.storage) if isinstance(recipe, CausalRecipe) else None,
        method=method_config(options.get("method", "dense"), of_method),
        height=options.get("height"),
        width=options.get("width"),
        decode=options.get("decode", OWN_VAE),
        decode_device=None if asked.decode_device is None else resolve_device(asked.decode_device),
        device=device,
    )
    say(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)
