"""Can the model continue a clip? Its first latent frames stay clean (timestep zero), the others are denoised."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt, score

from .captions import caption
from .config import Config
from .loop import Run
from .render import render, to_frames
from .scenes import sample_scenes

MOVING = ("left", "right", "up", "down", "circling", "bouncing")


@torch.no_grad()
def continue_clips(
    pipe: Any,
    prompts: list[str],
    prefix: torch.Tensor,
    frames: int,
    *,
    steps: int = 20,
    guidance: float = 3.0,
    shift: float = 3.0,
    seed: int = 0,
    text_tokens: int = 32,
) -> torch.Tensor:
    """Normalised latents (B, z, frames, h, w) that begin with `prefix`. A plain Euler solver over the noise levels."""
    device, model = prefix.device, pipe.transformer
    batch, channels, kept, height, width = prefix.shape
    noise = [
        torch.randn(channels, frames, height, width, generator=torch.Generator().manual_seed(seed * 1009 + row))
        for row in range(batch)
    ]
    latents = torch.stack(noise).to(device)
    latents[:, :, :kept] = prefix
    said, unsaid = pipe.encode_prompt(prompts, max_sequence_length=text_tokens, device=device)
    text = torch.cat([said, unsaid])
    line = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = (shift * line / (1 + (shift - 1) * line)).tolist()
    tokens = height * width // 4
    for level, following in itertools.pairwise(levels):
        timestep = torch.full((batch, frames, tokens), level * 1000, device=device)
        timestep[:, :kept] = 0
        velocity = model(latents.repeat(2, 1, 1, 1, 1), timestep.flatten(1).repeat(2, 1), text, return_dict=False)[0]
        with_text, without = velocity.chunk(2)
        step = (following - level) * (without + guidance * (with_text - without))
        latents[:, :, kept:] += step[:, :, kept:]
    return latents


@torch.no_grad()
def continuation_scores(run: Run, config: Config, pipe: Any, count: int) -> tuple[dict[str, float], np.ndarray]:
    """Continue rendered clips and compare the object's path with the true one, and with standing still.

    Also returns true and continued clips, in turns, for looking at.
    """
    kept = config.evaluation.prefix_frames
    scenes = sample_scenes(count, (run.seed, 51), frames=config.clip.frames, two_objects=0.0, held_out="only")
    prompts = [caption(scenes, row)[0] for row in range(count)]
    video = render(scenes, run.device, config.clip.size)
    vae = pipe.vae
    mean, std = (
        torch.tensor(values, device=run.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    made = []
    for start in range(0, count, config.evaluation.batch):
        part = slice(start, start + config.evaluation.batch)
        latents = (vae.encode(video[part]).latent_dist.mode() - mean) / std
        steps = config.evaluation.steps
        guidance = config.evaluation.guidance
        continued = continue_clips(
            pipe, prompts[part], latents[:, :, :kept], latents.shape[2], steps=steps, guidance=guidance
        )
        made.append(vae.decode(continued * std + mean).sample)
    true, drawn = to_frames(video), to_frames(torch.cat(made))
    return _compare(scenes, prompts, true, drawn, first=2 * kept - 1, size=config.clip.size)


def _compare(
    scenes: dict, prompts: list[str], true: np.ndarray, drawn: np.ndarray, *, first: int, size: int
) -> tuple[dict[str, float], np.ndarray]:
    """Centre errors in pixels over the frames after the prefix, for objects that move; what was found in all clips."""
    errors, frozen, found, right = [], [], [], []
    for row, prompt in enumerate(prompts):
        expected = parse_prompt(prompt)
        content = analyse(drawn[row])
        right.append(score(content, expected)["motion"])
        wanted = expected.objects[0]
        same = [thing for thing in content.objects if thing.colour == wanted.colour]
        found.append(bool(same) and bool(np.isfinite(same[0].track[first:, 0]).mean() > 0.8))
        reference = analyse(true[row]).objects
        if wanted.motion not in MOVING or not same or not reference:
            continue
        path, made = reference[0].track[:, :2], same[0].track[:, :2]
        errors.append(np.nanmean(np.linalg.norm(made[first:] - path[first:], axis=1)) * size / 2)
        frozen.append(np.nanmean(np.linalg.norm(path[first:] - path[first - 1], axis=1)) * size / 2)

    def mean(values: list[Any]) -> float:
        usable = [value for value in values if value is not None and np.isfinite(value)]
        return round(float(np.mean(usable)), 3) if usable else -1.0

    scores = {
        "centre_error_px": mean(errors),
        "frozen_error_px": mean(frozen),
        "object_kept": mean(found),
        "motion": mean(right),
        "clips": float(len(prompts)),
    }
    pairs = np.stack([true, drawn], 1).reshape(-1, *true.shape[1:])[:24]
    return scores, (pairs * 255).round().astype(np.uint8)
