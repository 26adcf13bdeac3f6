"""Stage `stream-windows`: how the bundled model holds out window after window, by the way and what is done against drift.

Two baselines have the same length: stock clips one after another ("clips"), and one of which the last frame stands ("frozen").
Columns with a strength change a video: the prompt's scene, drawn to and fro over another background.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tilewise
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.quality.demo_world import COLOURS
from tilewise.pipelines.streaming.windows.plan import window_recipe

from . import checkpoints
from .causal.measures import measure_clip
from .causal.streamed import OF, spread
from .evaluation import environment, held_out_prompts
from .loop import Run
from .render import render, to_frames
from .scenes import Scenes, take

CLIPS, FROZEN = "clips", "frozen"  # the baselines
GUARDS = ("", " adain=1", " prefix_noise=0.02", " sink=2", " sink=2 previous=2")
COLUMNS = (
    *(f"prefix{guard}" for guard in GUARDS),
    *(f"renoised{guard}" for guard in GUARDS if "prefix" not in guard),
    CLIPS,
    FROZEN,
)
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
_worker: dict[str, Any] = {}


def column_options(column: str) -> dict[str, Any]:
    """Options of `tilewise.stream` from "prefix adain=1 sink=2"."""
    way, *said = column.split()
    values = (one.split("=") for one in said)
    return {"way": way, **{name: int(value) if value.isdigit() else float(value) for name, value in values}}


def stream_windows(
    run: Run,
    model: Path,
    *,
    columns: Sequence[str] = COLUMNS,
    prompts: int = 64,
    windows: int = 20,
    frames: int | None = None,
    steps: int | None = None,
    overlap: int | None = None,
    seconds: float | None = None,
    workers: int = 1,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure; writes `windows_evaluation.json`, anew after each clip. No clip is begun after `seconds`.

    columns: of the table; see `column_options`, or a baseline. windows: of a clip; frames: of a clip, in place of them. steps,
    overlap: None for the model's own. workers: processes, which share the GPUs of the machine. Clips that the file has are kept,
    so that a later run goes on.
    """
    begun, path = time.monotonic(), run.path("windows_evaluation.json")
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"columns": {}}
    asked = {"windows": windows, "frames": frames, "steps": steps, "overlap": overlap, "dtype": dtype}
    texts, _ = held_out_prompts(OF, run.seed)
    todo = []
    for number in spread(prompts):
        for column in columns:
            known = report["columns"].get(column, {})
            if known.get("asked") != asked:
                report["columns"][column] = known = {"asked": asked, "rows": []}
            if not any(row["prompt"] == texts[number] for row in known["rows"]):
                todo.append((number, column))
    until = None if seconds is None else begun + seconds
    for column, recipe, row in _measured(todo, workers, (str(run.device), model, dtype, asked, run.seed, until)):
        if row is None:
            run.say(f"stream-windows: no time left for {column}")
            continue
        rows = sorted([*report["columns"][column]["rows"], row], key=lambda one: texts.index(one["prompt"]))
        run.say(f"stream-windows: {column}", {k: v for k, v in row.items() if k != "activity"})
        report["columns"][column] = {
            "asked": asked,
            "recipe": recipe,
            **shares(rows),
            "rows": rows,
            **environment(run.device),
        }
        checkpoints.write_json(path, {"columns": {name: one for name, one in report["columns"].items() if one["rows"]}})
    return report


def _measured(todo: list[tuple[int, str]], workers: int, settings: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    """What `_clip` gives of each, as soon as it is there."""
    if workers == 1:  # in this process
        _begin(None, *settings)
        yield from map(_clip, todo)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(workers):
        places.put(place)
    with ProcessPoolExecutor(workers, context, _begin, (places, *settings)) as pool:
        for done in as_completed([pool.submit(_clip, one) for one in todo]):
            yield done.result()


def _begin(
    places: Any, device: str, model: Path, dtype: str, asked: dict[str, Any], seed: int, until: float | None
) -> None:
    """places: gives a worker its number; None: the only one."""
    if places is not None:
        torch.set_num_threads(1)
        if device == "cuda":
            device = f"cuda:{places.get() % torch.cuda.device_count()}"
    texts, scenes = held_out_prompts(OF, seed)
    pipe = load_pipeline(model, device=device, dtype=dtype)
    _worker.update(pipe=pipe, asked=asked, texts=texts, scenes=scenes, seed=seed, until=until)


def _clip(one: tuple[int, str]) -> tuple[str, Any, Any]:
    """(column, recipe, row of measures) of a prompt's number and a column; None for both where there is no time left."""
    number, column = one
    if _worker["until"] is not None and time.monotonic() > _worker["until"]:  # one clock for all processes of a machine
        return column, None, None
    text, asked = _worker["texts"][number], _worker["asked"]
    started = time.monotonic()
    clip, at, recipe = make(
        _worker["pipe"], text, column, asked, _worker["seed"] + number, take(_worker["scenes"], np.array([number]))
    )
    took = time.monotonic() - started
    row = {**measure_clip(text, clip, at=at), "frames_per_second": round(len(clip) / took, 2)}
    return column, recipe, row


def make(
    pipe: Any, prompt: str, column: str, asked: dict[str, Any], seed: int, scene: Scenes
) -> tuple[np.ndarray, list[int], dict[str, Any]]:
    """A clip of a column of the table, the frames that windows begin at, and the recipe.

    asked: as in the file. scene: the prompt's, which columns that change a video begin with.
    """
    options = {"way": "prefix"} if column in (CLIPS, FROZEN) else column_options(column)
    strength = options.pop("strength", None)
    recipe = window_recipe(pipe, steps=asked["steps"], overlap=asked["overlap"], **options)
    first = 1 + 2 * (recipe.window - 1)
    frames = asked["frames"] or first + 2 * recipe.chunk * (asked["windows"] - 1)
    seconds = (first if column in (CLIPS, FROZEN) else frames) / recipe.fps
    given: dict[str, Any] = {}
    if strength is not None:
        given = {"strength": strength, "video": [source_video(scene, frames, recipe.height)]}
    with tilewise.stream(pipe, prompt, recipe=recipe, seed=seed, seconds=seconds, **given) as video:
        parts = [chunk.frames for chunk in video]
    told = {**recipe.to_dict(), **({} if strength is None else {"strength": strength})}
    if column == FROZEN:
        still = np.repeat(parts[0][-1:], frames - first, 0)
        return np.concatenate([parts[0], still]), list(range(first, frames, 2 * recipe.chunk)), told
    if column == CLIPS:
        for number in range(1, -(-frames // first)):
            with tilewise.stream(pipe, prompt, recipe=recipe, seed=seed + 10_000 * number) as video:
                parts.append(next(video).frames)
    clip = np.concatenate(parts)[:frames]
    return clip, np.cumsum([len(part) for part in parts])[:-1].tolist(), told


def source_video(scene: Scenes, frames: int, height: int) -> np.ndarray:
    """(frames, height, height, 3) uint8: one scene, its motion to and fro, over a background of another colour."""
    count = scene["x0"].shape[1]
    there = np.arange(count)
    path = np.resize(np.concatenate([there, there[-2:0:-1]]), frames)
    moved = {
        name: values[:, path] if values.ndim == 2 and values.shape[1] == count else values
        for name, values in scene.items()
    }
    taken = {int(scene["colour0"][0]), int(scene["background"][0])}
    moved["background"] = np.array([next(n for n in range(len(COLOURS)) if n not in taken)])
    shown: np.ndarray = (to_frames(render(moved, height=height))[0] * 255).round().astype(np.uint8)
    return shown


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
