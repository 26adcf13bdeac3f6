"""Stage `stream-causal`: the measures of long clips on what `tilewise.stream` makes, by the cache's policy and window."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tilewise
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt
from tilewise.plugins.streaming.kv_cache import KVCache

from .. import checkpoints
from ..evaluation import environment, held_out_prompts
from ..loop import Run
from .evaluation import recoloured
from .measures import measure_change, measure_clip

OF = 64  # prompts that evaluate-causal measures; fewer are spread over them
AFTER = 5  # chunks after the change of the prompt


def stream_causal(
    run: Run,
    model: Path,
    lora: Path,
    *,
    policies: Sequence[str] = ("fixed",),
    windows: Sequence[int] | None = None,
    prompts: int = 8,
    frames: int = 240,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure; writes `stream_evaluation.json`, anew after each clip. No clip is begun after `seconds`.

    Each clip is one stream: `frames` of one prompt, then five chunks with another colour. Clips that the file has are kept, so
    that a later run goes on.
    """
    pipe, recipe = tilewise.load_causal_checkpoint(lora, load_pipeline(model, device=str(run.device)))
    texts, scenes = held_out_prompts(OF, run.seed)
    after = recoloured(scenes, run.seed)
    begun, path = time.monotonic(), run.path("stream_evaluation.json")
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"policies": {}}
    for policy, window in itertools.product(policies, windows or [recipe.window]):
        cache = KVCache(window, recipe.sink, sink_position=recipe.sink_position, policy=policy)
        column = policy if window == recipe.window else f"{policy}, window {window}"
        kept = report["policies"].get(column, {})
        rows: list[dict[str, Any]] = kept["rows"] if kept.get("frames") == frames else []
        for number in spread(prompts):
            if any(row["prompt"] == texts[number] for row in rows):
                continue
            if seconds is not None and time.monotonic() - begun > seconds:
                run.say(f"stream-causal: no time left for {column}, {texts[number]}")
                break
            started = time.monotonic()
            clip, change = _clip(pipe, texts[number], after[number], frames, recipe.chunk, cache, run.seed + number)
            took = time.monotonic() - started
            row = measure_clip(texts[number], clip[:frames], recipe.chunk)
            row |= {"change": _change(texts[number], after[number], clip, change, recipe.chunk)}
            rows.append({**row, "frames_per_second": round(len(clip) / took, 2)})
            run.say(f"stream-causal: {column}", {k: v for k, v in rows[-1].items() if k != "activity"})
            report["policies"][column] = {"window": window, "frames": frames, **_shares(rows), "rows": rows}
            report["policies"][column] |= environment(run.device)
            checkpoints.write_json(path, report)
    return report


def spread(count: int) -> list[int]:
    """Numbers of prompts: every motion in turn, and as many of the seen combinations as of the others."""
    return [9 * index % OF for index in range(min(count, OF))]


def _clip(
    pipe: Any, before: str, after: str, frames: int, chunk: int, cache: KVCache, seed: int
) -> tuple[np.ndarray, int]:
    """Frames, and the number of the first chunk with the second prompt."""
    change = -(-(frames + 1) // (2 * chunk))
    parts = []
    with tilewise.stream(pipe, before, cache=cache, seed=seed) as video:
        for number in range(change + AFTER):
            if number == change:
                video.set_prompt(after)
            parts.append(next(video).frames)
    return np.concatenate(parts), change


def _change(before: str, after: str, clip: np.ndarray, number: int, chunk: int) -> dict[str, bool]:
    """As `measure_change`, and the colours in the chunks from the third on."""
    result = measure_change(before, after, clip, number, chunk)
    want, late = parse_prompt(after), analyse(clip[2 * chunk * (number + 2) - 1 :])
    thing = want.objects[0]
    found = any(one.colour == thing.colour and one.shape == thing.shape for one in late.objects)
    return {
        "colour": result["colour"],
        "new_colour": result["new_colour"],
        "colour_later": bool(found and late.background_colour == want.background_colour),
        "goes_on": result["goes_on"],
    }


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def share(values: Iterable[Any]) -> float | None:
        known = [float(value) for value in values if value is not None]
        return round(float(np.mean(known)), 4) if known else None

    names = ("kept", "object", "background", "pattern", "first_object", "moving", "kind", "border_steps", "inner_steps")
    return {
        "clips": len(rows),
        **{name: share(row[name] for row in rows) for name in names},
        "change": {name: share(row["change"][name] for row in rows) for name in rows[0]["change"]},
        "drift": [round(float(value), 2) for value in np.median([row["drift"] for row in rows], 0)],
        "frames_per_second": round(float(np.median([row["frames_per_second"] for row in rows])), 2),
    }
