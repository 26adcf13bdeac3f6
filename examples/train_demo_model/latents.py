"""The denoiser's training data: latents and captions of rendered clips, all held on the device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from . import checkpoints
from .captions import captions_and_labels
from .config import Config
from .loop import Run
from .render import render
from .scenes import sample_scenes, take
from .text_training import tokenize
from .vae_training import load_vae
from .whole_clip_vae import WholeClipVae, use_channels_last

SHARD = 8192


@dataclass
class Dataset:
    """Normalised latents (N, z, t, h, w) and, for each clip, several captions (N, variants, tokens) with labels."""

    latents: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def build_dataset(
    run: Run, config: Config, tokenizer: PreTrainedTokenizerFast, *, count: int, key: int, held_out: str = "exclude"
) -> Dataset:
    """Render, encode and caption `count` clips. Latents are kept in the run's folder for the next invocation."""
    scenes = sample_scenes(
        count, (run.seed, key), frames=config.clip.frames, two_objects=config.clip.two_objects, held_out=held_out
    )
    begun = time.monotonic()
    latents = _load_or_encode(run, config, scenes, count, key)
    run.sync()
    run.say(f"latents {tuple(latents.shape)} ready in {time.monotonic() - begun:.1f} s")
    ids, masks, labels = [], [], []
    for variant in range(config.denoiser.caption_variants):
        texts, answers = captions_and_labels(scenes, (run.seed, key, variant))
        variant_ids, variant_mask = tokenize(tokenizer, texts, run.device)
        ids.append(variant_ids)
        masks.append(variant_mask)
        labels.append(torch.from_numpy(answers).to(run.device))
    run.say(f"captions ready in {time.monotonic() - begun:.1f} s")
    return Dataset(latents, torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(labels, 1))


def _load_or_encode(run: Run, config: Config, scenes: dict, count: int, key: int) -> torch.Tensor:
    size = config.clip.size // 4
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32
    latents = torch.empty(
        count, config.vae.z_dim, (config.clip.frames - 1) // 2 + 1, size, size, dtype=dtype, device=run.device
    )
    vae, facts = load_vae(run, config, "vae")
    whole = WholeClipVae(vae.requires_grad_(False))
    if run.device.type == "cuda":
        use_channels_last(vae)
    mean, std = (
        torch.tensor(facts[name], device=run.device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    keep = True
    for start in range(0, count, SHARD):
        stop = min(start + SHARD, count)
        path = run.path(f"latents/{key}-{start:06d}-{stop:06d}.safetensors")
        if path.exists():
            latents[start:stop] = checkpoints.load(path, run.device)[0]["latents"]
            continue
        begun = time.monotonic()
        for first in range(start, stop, 64):
            last = min(first + 64, stop)
            video = render(take(scenes, slice(first, last)), run.device, config.clip.size)
            with torch.no_grad(), run.autocast():
                encoded = whole.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].float()
            latents[first:last] = ((encoded - mean) / std).to(dtype)
        run.sync()
        encoding, begun = time.monotonic() - begun, time.monotonic()
        if keep:
            checkpoints.save(path, {"latents": latents[start:stop]})
            keep = time.monotonic() - begun < 2 * encoding  # on a slow disk, encoding again is the better cache
    return latents
