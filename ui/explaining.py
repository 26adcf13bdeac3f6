"""The work behind `tilewise explain`."""

from __future__ import annotations

import json

from tilewise.pipelines.loading import load_skeleton
from tilewise.pipelines.native import native_size
from tilewise.plugins.explain import explain
from tilewise.ui.options import method_config


def explain_command(
    model: str,
    method: str,
    window: str | None,
    density: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
    *,
    as_json: bool,
) -> None:
    """Prints what a method would do with a model at a size; reads no weights."""
    config = method_config(method, window, density)
    skeleton = load_skeleton(model)
    native = native_size(skeleton)
    explanation = explain(
        skeleton,
        height=native.height if height is None else height,
        width=native.width if width is None else width,
        num_frames=native.num_frames if frames is None else frames,
        num_inference_steps=native.steps if steps is None else steps,
        method=config,
    )
    print(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)
