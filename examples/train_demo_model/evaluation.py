"""Stage `evaluate`: does the model draw what prompts say? Usable on any pipeline: `evaluate_prompts` only calls it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tilewise.pipelines.clip_content import ClipContent, analyse, parse_prompt, score

from . import checkpoints
from .captions import caption
from .config import Config
from .continuation import continuation_scores
from .export import build_pipeline
from .loop import Run
from .scenes import Scenes, sample_scenes
from .vae_training import held_out_psnr


@dataclass
class PromptScores:
    """Share of clips that are right, by attribute; and the same for each clip, with its frames."""

    scores: dict[str, float]
    rows: list[dict[str, Any]]
    clips: np.ndarray  # (prompts, frames, height, width, 3), uint8
    seconds: float


def held_out_prompts(count: int, seed: int = 0) -> tuple[list[str], Scenes]:
    """Plain full sentences for single objects in combinations that training left out, balanced over motions."""
    scenes = sample_scenes(count * 8, (seed, 41), two_objects=0.0, held_out="only")
    by_motion = [list(np.flatnonzero(scenes["motion0"] == motion)) for motion in range(8)]
    rows = [by_motion[index % 8][index // 8] for index in range(count)]
    scenes = {key: value[rows] for key, value in scenes.items()}
    return [caption(scenes, row)[0] for row in range(count)], scenes


def evaluate_prompts(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 6.0,
    batch: int = 16,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
    frames: int = 17,
    **arguments: Any,
) -> PromptScores:
    """Generate a clip for each prompt with a plain pipeline call (seeded per prompt) and score what is in it."""
    begun = time.monotonic()
    clips = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        # Noise from the CPU's generator is the same on every device.
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + row) for row in range(len(part))]
        video = pipe(
            part,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            **arguments,
        ).frames
        clips.append((np.asarray(video) * 255).round().astype(np.uint8))
    seconds = time.monotonic() - begun
    stack = np.concatenate(clips)
    rows = [_row(prompt, analyse(clip)) for prompt, clip in zip(prompts, stack, strict=True)]
    return PromptScores(mean_scores([row["right"] for row in rows]), rows, stack, seconds)


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
        said = [result[key] for result in results if result[key] is not None]
        if said:
            means[key] = round(float(np.mean(said)), 4)
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
    size = {"height": config.clip.size, "width": config.clip.size, "frames": config.clip.frames}
    results: dict[str, PromptScores] = {}
    pipe = None
    for name in ("unipc", "euler") if scheduler == "best" else (scheduler,):
        pipe = build_pipeline(run, config, name)
        results[name] = evaluate_prompts(
            pipe, texts, steps=settings.steps, guidance=settings.guidance, batch=settings.batch, seed=run.seed, **size
        )
        run.say(f"evaluate: {name}", results[name].scores, f"{results[name].seconds:.1f} s")
    assert pipe is not None
    best = max(results, key=lambda name: (results[name].scores["everything"], sum(results[name].scores.values())))
    contact_sheet(results[best].clips, folder / "evaluation.png")
    pipe = build_pipeline(run, config, best)
    # Few text tokens instead of the pipeline's many padded ones: the model is meant to work with either.
    short = evaluate_prompts(
        pipe,
        texts,
        steps=settings.steps,
        guidance=settings.guidance,
        batch=settings.batch,
        seed=run.seed,
        max_sequence_length=32,
        **size,
    )
    run.say("evaluate: 32 text tokens", short.scores)
    continued, sheet = continuation_scores(run, config, pipe, min(count, 32))
    run.say("evaluate: continuation", continued)
    contact_sheet(sheet, folder / "continuation.png", columns=2, moments=9)
    report = {
        "prompts": count,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "scheduler": best,
        "scores": results[best].scores,
        "scores_short_text": short.scores,
        "scores_by_scheduler": {name: result.scores for name, result in results.items()},
        "vae_psnr": held_out_psnr(run, config, pipe.vae),
        "continuation": continued,
        "clips": results[best].rows,
    }
    run.say("evaluate: VAE", report["vae_psnr"])
    checkpoints.write_json(folder / "evaluation.json", report)
    return report
