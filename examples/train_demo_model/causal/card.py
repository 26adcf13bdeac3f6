"""The causal mode's part of the model card, from the files in the exported folder's `causal/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROWS = {
    "kept": "object and background kept",
    "object": "object kept",
    "background": "background's colour kept",
    "pattern": "background's pattern kept",
    "first_object": "object right in the first quarter",
    "moving": "motion goes on",
    "kind": "motion of the right kind",
    "border_steps": "steps across chunk borders that are no jumps",
    "inner_steps": "other steps that are no jumps",
}
CHANGE = {
    "new_colour": "new colour in the second or third chunk after a change of the prompt",
    "colour": "new colour and the object's shape there",
    "colour_later": "new colour from the third chunk on",
    "goes_on": "object where its motion leads after a change",
}
GOALS = {"kept": "90 %", "moving": "85 %", "new_colour": "90 %"}


def causal_card(folder: Path) -> str:
    """Markdown; empty for a model without the causal mode."""
    recipe, training, sampler, streams = (
        json.loads(path.read_text()) if (path := folder / "causal" / name).exists() else {}
        for name in ("recipe.json", "training.json", "evaluation.json", "stream_evaluation.json")
    )
    if not recipe:
        return ""
    lora = folder / "causal" / "causal_lora.safetensors"
    rank, trained = _rank(lora), training["rank"]
    made = f"{training['device']}, torch {training['torch']}"
    passes, first = len(recipe["timesteps"]), len(recipe["first_timesteps"])
    parts = [
        f"""## The causal mode
`causal/` has a LoRA (rank {rank}, {lora.stat().st_size / 1e6:.1f} MB) that makes the model stream, without guidance:
{recipe["chunk"]} latent frames a chunk, {passes} passes a chunk and {first} in the first, a window of {recipe["window"]} of them,
{recipe["sink"]} as a sink.

```py
pipe, recipe = tilewise.load_causal_checkpoint("pipelines/demo_model/causal/causal_lora.safetensors", pipe)
video = tilewise.stream(pipe, "a red circle bouncing on a blue striped background", seconds=30)
```

Trained for {training["steps"]:,} steps on {training["clips"]:,} clips, {training["minutes"]:g} minutes on {made}."""
    ]
    if before := training.get("before"):
        runs = ", then ".join(
            f"{run['steps']:,} steps ({run['minutes']:g} minutes, rank {run['rank']})" for run in before
        )
        parts[0] += f"\nIt began with the weights of earlier runs: {runs}."
    if rank != trained:
        parts[0] += f"\nIt was trained with rank {trained} and cut to {rank}, in float16, afterwards (`shrink-causal`)."
    if sampler:
        settings = sampler["settings"]
        columns = {name: result | (sampler["change"] if name == "recipe" else {}) for name, result in settings.items()}
        parts.append(
            f"**The recipe's own sampler**, rank {trained}: {sampler['prompts']} prompts, {sampler['frames']} frames each. "
            "Shares are of clips, and of\ntheir last quarter unless said. The prompt changes halfway, to another colour.\n\n"
            f"{_table(columns)}\n\n"
            f"Median drift of the background's colour since the first quarter: {_drift(settings['recipe'])} of 255.\n"
            f"Measured on {_place(sampler)} by the stage `causal`."
        )
    change = folder / "causal" / "change_evaluation.json"
    if change.exists():
        early = json.loads(change.read_text())
        parts.append(
            f"Where the prompt changes early, before chunk {early['changed_at_chunk']}, the new colour is there in two chunks "
            f"in {early['change']['new_colour']:.0%}\nof {early['prompts']} clips, and with the object's shape in "
            f"{early['change']['colour']:.0%}. Measured on {_place(early)} by `evaluate-causal`."
        )
    if streams:
        columns = {name: result | result["change"] for name, result in streams["policies"].items()}
        counts = ", ".join(f"{result['clips']} ({name})" for name, result in streams["policies"].items())
        one = next(iter(streams["policies"].values()))
        parts.append(
            f"**`tilewise.stream`**, by the policy of the cache, window {recipe['window']} where none is named: {one['frames']} "
            f"frames of a prompt, then another\ncolour. Clips: {counts};\nso few say only that it works.\n\n{_table(columns)}\n\n"
            f"Measured on {_place(one)} by the stage `stream-causal`."
        )
    return "\n\n".join(parts) + "\n\n"


def _rank(lora: Path) -> int:
    with safe_open(lora, framework="np") as tensors:
        name = next(name for name in tensors.keys() if "lora_A" in name)  # noqa: SIM118
        return int(tensors.get_slice(name).get_shape()[0])


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| measure | goal | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for key, text in (ROWS | CHANGE).items():
        values = [result.get(key) for result in columns.values()]
        if any(value is not None for value in values):
            cells = " | ".join("–" if value is None else f"{value:.0%}" for value in values)
            lines.append(f"| {text} | {GOALS.get(key, '–')} | {cells} |")
    return "\n".join(lines)


def _drift(result: Mapping[str, Any]) -> str:
    return " / ".join(f"{value:g}" for value in result["drift"])


def _place(result: Mapping[str, Any]) -> str:
    return f"{result['device']}, torch {result['torch']}, diffusers {result['diffusers']}, {result['date']},"
