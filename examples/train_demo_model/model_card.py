"""The exported folder's README.md, written from the files in that folder alone (stage `card`)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tilewise.pipelines.quality.demo_world import COLOURS, MOTIONS, PATTERNS, SHAPES

from .causal.card import causal_card
from .scenes import HELD_OUT

HALF_NAMES = {"seen combinations": "seen", "unseen combinations": "unseen"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def weight_files(folder: Path) -> list[Path]:
    """The model's own weights, without the LoRA of its causal mode."""
    return sorted(file for file in folder.rglob("*.safetensors") if file.parent.name != "causal")


def write_card(folder: Path) -> Path:
    """Write the folder's README.md; returns its path."""
    path = folder / "README.md"
    path.write_text(model_card(folder))
    return path


def model_card(folder: Path) -> str:
    """What the model is, what it was made for, how it scored, and what it cannot do."""
    native = read_json(folder / "tilewise.json")
    vae = read_json(folder / "vae" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    training, report = read_json(folder / "training.json"), read_json(folder / "evaluation.json")
    millions = {name: f"{_parameters(folder / name) / 1e6:.1f} M" for name in ("transformer", "vae", "text_encoder")}
    megabytes = sum(file.stat().st_size for file in weight_files(folder)) / 1e6
    height, width, frames = native["height"], native["width"], native["frames"]
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [wan, toy, text-to-video]
---

# The demo model: coloured shapes that move

A text-to-video model of the Wan architecture, small enough to ship with a repository and to run on a CPU. It was
trained from scratch on procedurally rendered clips, and it knows one small world: one or two coloured shapes that move
over a patterned background. It exists so that attention methods can be tried and measured on a *trained* model without
a download. It is not useful for anything else.

- Transformer {millions["transformer"]}, VAE {millions["vae"]} ({vae["scale_factor_spatial"]}× in space, \
{vae["scale_factor_temporal"]}× in time, {vae["z_dim"]} channels), text encoder {millions["text_encoder"]};
  {megabytes:.1f} MB of fp16 weights. Stock diffusers and transformers classes.
- Native size: {frames} frames of {height}×{width}, {native["fps"]} frames per second.
- Colours: {", ".join(COLOURS)}. Shapes: {", ".join(SHAPES)}.
- Motions: {", ".join(MOTIONS)}.
- Backgrounds: {", ".join(PATTERNS)}, in the same colours.
- It also takes one timestep per token, with clean first frames as a condition: it can continue a clip.

```python
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("pipelines/demo_model", torch_dtype=torch.float32)
frames = pipe(
    "a red circle moving right on a blue striped background",
    height={height},
    width={width},
    num_frames={frames},
    num_inference_steps={native["steps"]},
    guidance_scale={native["guidance"]},
    max_sequence_length=\
{native["max_sequence_length"]},
).frames[0]
```

## Goals
- A clip shows what its prompt says: colour, shape, motion and background of a single object, and not only in
  combinations that training contained.
- What a sparse attention method loses can be seen and counted, against dense attention on the same noise.
- Stock classes, fewer than 25 MB, and training from nothing in about half an hour on one data-centre GPU.

How far the first two are reached is measured below.

## Measured
{_measured(report)}

## Training
{_training(training)}

Data, code and seeds: `examples/train_demo_model/`. Scheduler: {scheduler["_class_name"]}, shift {shift:g}.
{int(HELD_OUT.sum())} of all {HELD_OUT.size} combinations of shape, colour and motion were kept out of training.

{causal_card(folder)}## Limits
- Only the words of its small vocabulary mean anything to it.
- "Seen" prompts are freshly drawn scenes, but the world is so small that training has most likely had a clip with the
  same description. Only the "unseen" half asks for something new, and there only the combination is new, not its parts.
- The prompts are plain full sentences about one object. Two objects, other wordings, sizes and lengths were trained
  on little or not at all and are not scored here.
- One clip per prompt: {_uncertainty(report)}
- The judge is an automatic detector (`tilewise.pipelines.quality.content_detection`), which makes mistakes of its own.
- Scores on this toy say whether a method breaks a model, not how it does on a large one.
"""


def _parameters(folder: Path) -> int:
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _uncertainty(report: dict[str, Any]) -> str:
    prompts = report.get("protocol", {}).get("prompts")
    if not prompts:
        return "shares are rough."
    half, error = prompts / 2, 100 * 0.5 / math.sqrt(prompts / 2)
    return f"a share over half of the prompts ({half:g}) has a standard error of up to {error:.0f} points."


def _measured(report: dict[str, Any]) -> str:
    parts = []
    if report.get("methods"):
        parts += [_protocol(report), _method_table(report["methods"]), _attribute_table(report["methods"])]
        parts.append(_provenance(report["methods"]))
    else:
        parts.append("Prompts: not scored yet.")
    if report.get("guidance_comparison"):
        parts.append(_guidance(report))
    if report.get("vae_psnr"):
        psnr = report["vae_psnr"]
        parts.append(
            f"**VAE.** Reconstruction of unseen clips: {psnr['mean']:.1f} dB on average, {psnr['min']:.1f} dB at worst."
        )
    if report.get("continuation"):
        values = report["continuation"]
        parts.append(
            f"**Continuation.** Given a clip's clean first frames, the object's centre is off by "
            f"{values['centre_error_px']:.1f} px on average\n(a frozen last frame: {values['frozen_error_px']:.1f} px), "
            f"over {values['clips']:g} clips of unseen combinations."
        )
    return "\n\n".join(parts)


def _protocol(report: dict[str, Any]) -> str:
    p = report["protocol"]
    return (
        f"{p['prompts']} prompts, one clip each, the same noise for every method: {p['steps']} steps "
        f"({p['scheduler']}), guidance {p['guidance']:g},\n{p['text_tokens']} text tokens, {p['frames']} frames of "
        f"{p['height']}×{p['width']}, seed {p['seed']}. Half of them ask for combinations of shape, colour and motion "
        f"that\ntraining contained (seen), half for combinations that it left out (unseen). A share is that of clips in "
        f'which the\ndetector found what the prompt said; "everything" means all attributes of a clip at once.'
    )


def _percent(scores: dict[str, float] | None, name: str) -> str:
    return f"{scores[name]:.1%}" if scores and name in scores else "–"


def _columns(result: dict[str, Any]) -> list[dict[str, float] | None]:
    return [result["scores"], *(result["halves"].get(half) for half in HALF_NAMES)]


def _method_table(methods: dict[str, Any]) -> str:
    lines = [
        "| method | density | PSNR to dense, mean (worst) | everything: all | seen | unseen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in methods.items():
        distance = result.get("psnr_to_dense")
        closeness = f"{distance['mean']:.1f} dB ({distance['min']:.1f})" if distance else "–"
        shares = " | ".join(_percent(column, "everything") for column in _columns(result))
        lines.append(f"| {name} | {result['density']:.2f} | {closeness} | {shares} |")
    partly = [
        f"{name} {result['overall_density']:.2f}"
        for name, result in methods.items()
        if abs(result.get("overall_density", result["density"]) - result["density"]) > 0.005
    ]
    if partly:
        lines += ["", f"Density is that of the sparse calls; over all attention calls: {', '.join(partly)}."]
    return "\n".join(lines)


def _attribute_table(methods: dict[str, Any]) -> str:
    names = [f"{name}: all | seen | unseen" for name in methods]
    lines = [f"| attribute | {' | '.join(names)} |", "| --- |" + " --- |" * (3 * len(methods))]
    for attribute in next(iter(methods.values()))["scores"]:
        cells = [_percent(column, attribute) for result in methods.values() for column in _columns(result)]
        lines.append(f"| {attribute.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _provenance(methods: dict[str, Any]) -> str:
    places: dict[str, list[str]] = {}
    for name, result in methods.items():
        place = f"{result['device']}, torch {result['torch']}, diffusers {result['diffusers']}, {result['date']}"
        places.setdefault(place, []).append(name)
    text = "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items())
    return (
        f"Measured on {text}. Commands and the wrong clips: `evaluation.json`. A preset is named as it was on that day; "
        "the same attributes under each of today's presets, background too: `docs/choosing.md`."
    )


def _guidance(report: dict[str, Any]) -> str:
    keys = ("motion", "background_pattern", "everything")

    def shares(scores: dict[str, float]) -> str:
        return ", ".join(f"{key.replace('_', ' ')} {scores[key]:.1%}" for key in keys)

    lines = [
        "**Guidance.** Strong guidance flattens the backgrounds' patterns. Dense, combinations unseen in training:"
    ]
    lines += [
        f"- guidance {entry['guidance']:g}, {entry['text_tokens']} text tokens, {entry['prompts']} prompts: "
        f"{shares(entry['scores'])}"
        for entry in report["guidance_comparison"]
    ]
    unseen = report.get("methods", {}).get("dense", {}).get("halves", {}).get("unseen combinations")
    if unseen:
        p = report["protocol"]
        lines.append(
            f"- guidance {p['guidance']:g}, {p['text_tokens']} text tokens, {p['prompts'] // 2} other prompts (the table "
            f"above): {shares(unseen)}"
        )
    return "\n".join(lines)


def _training(training: dict[str, Any]) -> str:
    if not training.get("stages"):
        return "Not recorded."
    lines = ["| stage | steps | minutes | at the end |", "| --- | --- | --- | --- |"]
    for name, stage in training["stages"].items():
        facts = [f"{key.replace('_', ' ')} {value:g}" for key, value in stage["metrics"].items()]
        held_out = stage.get("held_out_psnr")
        if held_out:
            facts.append(f"held-out PSNR {held_out['mean']:g} dB (worst {held_out['min']:g})")
        lines.append(f"| {name} | {stage['steps']:,} | {stage['minutes']:g} | {', '.join(facts) or '–'} |")
    lines += [
        "",
        f"{training['minutes']:g} minutes of training in all, on {training['device']}, torch {training['torch']}.",
    ]
    if training.get("remark"):
        lines.append(training["remark"])
    return "\n".join(lines)
