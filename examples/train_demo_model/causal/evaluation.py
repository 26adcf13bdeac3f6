"""Stage `evaluate-causal`: long clips of the causal mode, by the plain sampler beside this file, and what is left in them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewise.pipelines.quality.demo_world import COLOURS

from .. import checkpoints
from ..captions import caption
from ..config import CausalConfig, Config
from ..denoiser_training import encode_text
from ..evaluation import contact_sheet, environment, held_out_prompts
from ..loop import Run
from ..scenes import Scenes
from ..text_training import tokenize
from ..whole_clip_vae import WholeClipVae
from .attention import Rotation, Window
from .lora import load_lora
from .measures import measure_changes, measure_clips
from .sampler import ChunkSampler, noise_levels
from .training import load_pipeline, recipe


class LongClips:
    """Makes clips of many chunks with the base model and a LoRA file."""

    def __init__(self, run: Run, config: Config, model: Path, lora: Path) -> None:
        self.run, self.sizes, self.size = run, config.causal, config.clip.size
        self.pipe = load_pipeline(model, run.device)
        load_lora(self.pipe.transformer, checkpoints.load(lora, run.device)[0])
        grid = self.size // 8
        self.rotation = Rotation(self.pipe.transformer, self.sizes.chunk, grid, grid)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        return encode_text(self.pipe.text_encoder, *tokenize(self.pipe.tokenizer, list(prompts), self.run.device))

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        chunks: int,
        *,
        settings: dict[str, Any],
        after: Sequence[str] = (),
        change: int = 0,
    ) -> torch.Tensor:
        """Normalised latents (B, z, frames, h, w); from the chunk `change` on with the prompts `after`."""
        run, sizes = self.run, self.sizes
        vae: Any = self.pipe.vae
        shape = torch.Size([len(prompts), vae.config.z_dim, sizes.chunk, self.size // 4, self.size // 4])
        generator = run.generator(80)
        text = self.text(prompts)
        made: dict[int, torch.Tensor] = {}
        with ChunkSampler(
            self.pipe.transformer,
            Window(*settings["window"]),
            self.rotation,
            levels=noise_levels(settings["timesteps"], sizes.shift),
            first_levels=noise_levels(settings["first_timesteps"], sizes.shift),
            solver=settings["solver"],
            autocast=run.autocast,
        ) as sampler:
            for number in range(chunks):
                if after and number == change:
                    text = self.text(after)
                    sampler.recache(made, text)
                made[number] = sampler.make(shape, text, generator)
                sampler.give(made[number], text)
        return torch.cat(list(made.values()), 2)

    @torch.no_grad()
    def frames(self, latents: torch.Tensor, count: int) -> np.ndarray:
        """The first frames (B, count, height, width, 3), uint8."""
        vae: Any = self.pipe.vae
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        whole, parts = WholeClipVae(vae), []
        for part in latents.split(4):
            with self.run.autocast():
                video = whole.decode(part * std + mean)[:, :, :count].float()
            parts.append(((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy())
        whole.close()
        return np.concatenate(parts)


def settings_of(sizes: CausalConfig) -> dict[str, dict[str, Any]]:
    """What is compared: the recipe as exported, then one thing changed at a time."""
    given = recipe(sizes)
    window, sink, _ = sizes.windows[0]
    base = {
        "window": (window, sink),
        "timesteps": given["timesteps"],
        "first_timesteps": given["first_timesteps"],
        "solver": sizes.solver,
    }
    table = {"recipe": base}
    for other, its_sink, _ in sizes.windows[1:]:
        table[f"window {other * sizes.chunk}"] = {**base, "window": (other, its_sink)}
    table["renoise" if sizes.solver == "euler" else "euler"] = {
        **base,
        "solver": "renoise" if sizes.solver == "euler" else "euler",
    }
    table["first chunk as the others"] = {**base, "first_timesteps": given["timesteps"]}
    table["two passes"] = {**base, "timesteps": [1000.0, 500.0]}
    return table


def evaluate_causal(
    run: Run,
    config: Config,
    model: Path,
    lora: Path,
    *,
    prompts: int | None = None,
    frames: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure; writes `causal_evaluation.json` and two pictures. Settings beyond the first are left out after `seconds`."""
    sizes = config.causal
    count, length = prompts or sizes.prompts, frames or sizes.frames
    texts, scenes = held_out_prompts(count, run.seed)
    maker = LongClips(run, config, model, lora)
    begun = time.monotonic()
    path = run.path("causal_evaluation.json")
    report: dict[str, Any] = {"frames": length, "prompts": count, "settings": {}, **environment(run.device)}
    workers = min(os.cpu_count() or 1, 16)
    with _pool(workers if count > 4 else 1) as pool:
        for name, settings in settings_of(sizes).items():
            if report["settings"] and seconds is not None and time.monotonic() - begun > seconds:
                run.say(f"evaluate-causal: no time left for {name}")
                continue
            chunks = -(-(length + 1) // (2 * sizes.chunk))
            clips = maker.frames(maker.latents(texts, chunks, settings=settings), length)
            result = measure_clips(texts, list(clips), sizes.chunk, pool)
            rows = result.pop("rows")
            run.say(f"evaluate-causal: {name}", result)
            report["settings"][name] = {**settings, **result}
            if name == "recipe":
                report["rows"] = rows
                contact_sheet(clips[:32], run.path("causal.png"), columns=2, moments=12)
                report["change"] = _changes(run, maker, texts, scenes, settings, chunks // 2, pool)
                run.say("evaluate-causal: change of prompt", {k: v for k, v in report["change"].items() if k != "rows"})
            report["seconds"] = round(time.monotonic() - begun, 1)
            checkpoints.write_json(path, report)
    return report


def _pool(workers: int) -> Any:
    if workers == 1:
        return nullcontext()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def _changes(
    run: Run,
    maker: LongClips,
    texts: list[str],
    scenes: Scenes,
    settings: dict[str, Any],
    change: int,
    pool: Executor | None,
) -> dict[str, Any]:
    chunk = maker.sizes.chunk
    after = recoloured(scenes, run.seed)
    chunks = change + 5
    latents = maker.latents(texts, chunks, settings=settings, after=after, change=change)
    clips = maker.frames(latents, 2 * chunk * chunks - 1)
    contact_sheet(clips[:32, 2 * chunk * (change - 2) :], run.path("causal_change.png"), columns=2, moments=12)
    return measure_changes(texts, after, list(clips), change, chunk, pool)


def recoloured(scenes: Scenes, seed: int) -> list[str]:
    """The scenes' plain captions with another colour: of the object, in every fourth of the background."""
    rng = np.random.default_rng((seed, 81))
    changed = {key: values.copy() for key, values in scenes.items()}
    for row in range(len(scenes["colour0"])):
        free = [c for c in range(len(COLOURS)) if c not in (scenes["colour0"][row], scenes["background"][row])]
        changed["background" if row % 4 == 3 else "colour0"][row] = rng.choice(free)
    return [caption(changed, row)[0] for row in range(len(scenes["colour0"]))]
