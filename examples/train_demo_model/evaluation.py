"""Stage `evaluate`: does the trained model draw what prompts say? The parts are usable on any pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tilewise.pipelines.quality.content_detection import ClipContent, analyse
from tilewise.pipelines.quality.content_score import parse_prompt, score
from tilewise.pipelines.quality.demo_world import MOTIONS

from . import checkpoints
from .captions import caption
from .config import Config
from .continuation import continuation_scores
from .export import build_pipeline
from .loop import Run, device_name
from .scenes import Scenes, concatenate, sample_scenes, take
from .vae_training import held_out_psnr

HALVES = ("seen combinations", "unseen combinations")


@dataclass
class PromptScores:
    """Share of clips that are right, by attribute; and the same for each clip, with its frames."""

    scores: dict[str, float]
    rows: list[dict[str, Any]]
    clips: np.ndarray  # (prompts, frames, height, width, 3), uint8
    seconds: float


def held_out_prompts(count: int, seed: int = 0) -> tuple[list[str], Scenes]:
    """Different plain full sentences for single objects, in two halves, both balanced over motions.

    The first half draws fresh scenes from the combinations of shape, colour and motion that training contains, the second
    from those that training left out.
    """
    first = first_half(count)
    parts = [_balanced(first, (seed, 42), "exclude"), _balanced(count - first, (seed, 41), "only")]
    scenes = concatenate(*parts)
    return [caption(scenes, row)[0] for row in range(count)], scenes


def first_half(count: int) -> int:
    """How many of `count` prompts are of seen combinations."""
    return (count + 1) // 2


def _balanced(count: int, seed: tuple[int, ...], held_out: str) -> Scenes:
    scenes = sample_scenes(128 + count * 32, seed, two_objects=0.0, held_out=held_out)
    by_motion: list[dict[str, int]] = [{} for _ in MOTIONS]
    for row, motion in enumerate(scenes["motion0"]):
        by_motion[motion].setdefault(caption(scenes, row)[0], row)
    rows = [list(by_motion[index % len(MOTIONS)].values())[index // len(MOTIONS)] for index in range(count)]
    return take(scenes, np.array(rows, dtype=int))


def generate_clips(
    pipe: Any,
    prompts: Sequence[str],
    *,
    first: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
    frames: int = 17,
    **arguments: Any,
) -> np.ndarray:
    """One batch of clips (prompts, frames, height, width, 3), uint8, by a plain pipeline call.

    Each prompt has a seed of its own, by its number (`first` is that of the first one). The noise comes from the CPU's
    generator, which is the same on every device.
    """
    generators = [torch.Generator().manual_seed(seed * 100_003 + first + row) for row in range(len(prompts))]
    video = pipe(
        list(prompts),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
        **arguments,
    ).frames
    return (np.asarray(video) * 255).round().astype(np.uint8)


def evaluate_prompts(pipe: Any, prompts: Sequence[str], *, batch: int = 16, **arguments: Any) -> PromptScores:
    """Generate a clip for each prompt (`generate_clips` says how) and score what is in it."""
    begun = time.monotonic()
    starts = range(0, len(prompts), batch)
    clips = [generate_clips(pipe, prompts[start : start + batch], first=start, **arguments) for start in starts]
    seconds = time.monotonic() - begun
    stack = np.concatenate(clips)
    rows = judge(prompts, stack)
    return PromptScores(mean_scores([row["right"] for row in rows]), rows, stack, seconds)


def judge(prompts: Sequence[str], clips: np.ndarray) -> list[dict[str, Any]]:
    """For each clip: what was found in it, and which attributes of its prompt are right."""
    return [_row(prompt, analyse(clip)) for prompt, clip in zip(prompts, clips, strict=True)]


def report_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of all prompts and of each half, and what was wrong in the clips that were not all right."""
    split = first_half(len(rows))
    halves = dict(zip(HALVES, (rows[:split], rows[split:]), strict=True))
    wrong = {
        row["prompt"]: [key for key, right in row["right"].items() if right is False and key != "background"]
        for row in rows
    }
    return {
        "scores": mean_scores([row["right"] for row in rows]),
        "halves": {name: mean_scores([row["right"] for row in part]) for name, part in halves.items() if part},
        "wrong": {prompt: attributes for prompt, attributes in wrong.items() if attributes},
    }


def _row(prompt: str, content: ClipContent) -> dict[str, Any]:
    found = [f"{thing.colour} {thing.shape} {thing.motion}" for thing in content.objects]
    return {
        "prompt": prompt,
        "found": found,
        "background": f"{content.background_colour} {content.background_pattern}",
        "right": score(content, parse_prompt(prompt)),
    }


def mean_scores(results: Sequence[dict[str, bool | None]]) -> dict[str, float]:
    """Share of right ones by attribute, over those where something was expected; and of clips with everything right."""
    means = {}
    for key in results[0]:
        said = [bool(result[key]) for result in results if result[key] is not None]
        if said:
            means[key] = round(sum(said) / len(said), 4)
    means["everything"] = round(float(np.mean([all(v is not False for v in r.values()) for r in results])), 4)
    return means


def contact_sheet(clips: np.ndarray, path: Path, *, columns: int = 4, moments: int = 5) -> None:
    """A picture with a strip of frames for each clip."""
    index = np.linspace(0, clips.shape[1] - 1, min(moments, clips.shape[1])).round().astype(int)
    strips = [np.pad(np.concatenate(list(clip[index]), 1), ((1, 1), (2, 2), (0, 0))) for clip in clips]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    rows = [np.concatenate(strips[start : start + columns], 1) for start in range(0, len(strips), columns)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)


def evaluate(
    run: Run, config: Config, *, scheduler: str = "best", prompts: int | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Score the run's model; writes `evaluation.json`, the clips' contact sheet and that of the continuations."""
    folder = folder or run.folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.evaluation
    count = prompts or settings.prompts
    texts, _ = held_out_prompts(count, run.seed)
    protocol: dict[str, Any] = {
        "prompts": count,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": run.seed,
        "text_tokens": settings.text_tokens,
        "height": config.clip.size,
        "width": config.clip.size,
        "frames": config.clip.frames,
    }
    arguments = {key: protocol[key] for key in ("steps", "guidance", "seed", "height", "width", "frames")}
    arguments["batch"] = settings.batch
    results: dict[str, PromptScores] = {}
    pipe = None
    for name in ("unipc", "euler") if scheduler == "best" else (scheduler,):
        pipe = build_pipeline(run, config, name)
        results[name] = evaluate_prompts(pipe, texts, max_sequence_length=settings.text_tokens, **arguments)
        run.say(f"evaluate: {name}", results[name].scores, f"{results[name].seconds:.1f} s")
    assert pipe is not None
    best = max(results, key=lambda name: (results[name].scores["everything"], sum(results[name].scores.values())))
    contact_sheet(results[best].clips, folder / "evaluation.png")
    pipe = build_pipeline(run, config, best)
    # The pipeline's own default, which pads the text to many tokens: the model is meant to work with either.
    padded = evaluate_prompts(pipe, texts, **arguments)
    run.say("evaluate: padded text", padded.scores)
    continued, sheet = continuation_scores(run, config, pipe, min(count, 32))
    run.say("evaluate: continuation", continued)
    contact_sheet(sheet, folder / "continuation.png", columns=2, moments=9)
    dense = {
        "density": 1.0,
        **report_of(results[best].rows),
        "seconds": round(results[best].seconds, 1),
        "batch": settings.batch,
        **environment(run.device),
    }
    report = {
        "protocol": {**protocol, "scheduler": type(pipe.scheduler).__name__},
        "methods": {"dense": dense},
        "scheduler": best,
        "scores_by_scheduler": {name: result.scores for name, result in results.items()},
        "scores_padded_text": padded.scores,
        "vae_psnr": held_out_psnr(run, config, pipe.vae),
        "continuation": {**continued, "guidance": settings.guidance},
    }
    run.say("evaluate: VAE", report["vae_psnr"])
    checkpoints.write_json(folder / "evaluation.json", report)
    return report


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when something was measured."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if device.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    return {**facts, "date": datetime.now(UTC).date().isoformat()}
