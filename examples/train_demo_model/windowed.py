"""Stage `stream-windows`: how the bundled model holds out window after window, by the way and what is done against drift.

Two baselines have the same length: stock clips one after another ("clips"), and one of which the last frame stands ("frozen").
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tilewise
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.streaming.windows.plan import window_recipe
from tilewise.pipelines.streaming.windows.recipe import WindowRecipe

from . import checkpoints
from .causal.measures import measure_clip
from .causal.streamed import OF, spread
from .evaluation import environment, held_out_prompts
from .loop import Run

CLIPS, FROZEN = "clips", "frozen"  # the baselines
SHARES = (
    "kept",
    "object",
    "background",
    "pattern",
    "first_object",
    "alone",
    "moving",
    "kind",
    "border_steps",
    "inner_steps",
)


def column_options(column: str) -> dict[str, Any]:
    """Options of `tilewise.stream` from "prefix adain=1 prefix_noise=0.02"."""
    way, *said = column.split()
    return {"way": way, **{name: float(value) for name, value in (one.split("=") for one in said)}}


def stream_windows(
    run: Run,
    model: Path,
    *,
    columns: Sequence[str],
    prompts: int = 64,
    windows: int = 20,
    steps: int | None = None,
    overlap: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure; writes `windows_evaluation.json`, anew after each clip. No clip is begun after `seconds`.

    columns: of the table; see `column_options`, or a baseline. windows: of a clip. steps, overlap: None for the model's own.
    Clips that the file has are kept, so that a later run goes on.
    """
    pipe = load_pipeline(model, device=str(run.device))
    texts, _ = held_out_prompts(OF, run.seed)
    begun, path = time.monotonic(), run.path("windows_evaluation.json")
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"columns": {}}
    for number in spread(prompts):
        for column in columns:
            asked = {"windows": windows, "steps": steps, "overlap": overlap}
            kept = report["columns"].get(column, {})
            rows = kept["rows"] if kept.get("asked") == asked else []
            if any(row["prompt"] == texts[number] for row in rows):
                continue
            if seconds is not None and time.monotonic() - begun > seconds:
                run.say(f"stream-windows: no time left for {column}, {texts[number]}")
                return report
            started = time.monotonic()
            clip, at, recipe = make(pipe, texts[number], column, windows, steps, overlap, run.seed + number)
            took = time.monotonic() - started
            rows.append({**measure_clip(texts[number], clip, at=at), "frames_per_second": round(len(clip) / took, 2)})
            run.say(f"stream-windows: {column}", {k: v for k, v in rows[-1].items() if k != "activity"})
            report["columns"][column] = {
                "asked": asked, "recipe": recipe.to_dict(), **shares(rows), "rows": rows, **environment(run.device),
            }  # fmt: skip
            checkpoints.write_json(path, report)
    return report


def make(
    pipe: Any, prompt: str, column: str, windows: int, steps: int | None, overlap: int | None, seed: int
) -> tuple[np.ndarray, list[int], WindowRecipe]:
    """A clip of a column of the table, the frames that windows begin at, and the recipe."""
    options = {"way": "prefix"} if column in (CLIPS, FROZEN) else column_options(column)
    recipe = window_recipe(pipe, steps=steps, overlap=overlap, **options)
    first = 1 + 2 * (recipe.window - 1)
    frames = first + 2 * recipe.chunk * (windows - 1)
    seconds = (first if column in (CLIPS, FROZEN) else frames) / recipe.fps
    with tilewise.stream(pipe, prompt, recipe=recipe, seed=seed, seconds=seconds) as video:
        parts = [chunk.frames for chunk in video]
    if column == FROZEN:
        still = np.repeat(parts[0][-1:], frames - first, 0)
        return np.concatenate([parts[0], still]), list(range(first, frames, 2 * recipe.chunk)), recipe
    if column == CLIPS:
        for number in range(1, -(-frames // first)):
            with tilewise.stream(pipe, prompt, recipe=recipe, seed=seed + 10_000 * number) as video:
                parts.append(next(video).frames)
    clip = np.concatenate(parts)[:frames]
    return clip, np.cumsum([len(part) for part in parts])[:-1].tolist(), recipe


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares over all clips; drift is a median."""

    def share(values: Iterable[Any]) -> float | None:
        known = [float(value) for value in values if value is not None]
        return round(float(np.mean(known)), 4) if known else None

    return {
        "clips": len(rows),
        **{name: share(row[name] for row in rows) for name in SHARES},
        "drift": [round(float(value), 2) for value in np.median([row["drift"] for row in rows], 0)],
        "frames_per_second": round(float(np.median([row["frames_per_second"] for row in rows])), 2),
    }
