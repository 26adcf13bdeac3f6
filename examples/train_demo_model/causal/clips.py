"""Training data of the causal mode: long clips as chunks of latents, and the sequences that are cut from them."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from ..captions import captions_and_labels
from ..config import CausalConfig
from ..denoiser_training import encode_text
from ..loop import Run
from ..render import render
from ..scenes import Scenes, take
from ..text_training import tokenize
from ..whole_clip_vae import WholeClipVae, use_channels_last
from .paths import change_colours, continuing_scenes

NEVER = 1 << 20  # the chunk of a change that does not come


@dataclass
class Clips:
    """latents (N, chunks, z, frames, h, w), normalised. text (2, N, variants, tokens, width): captions before and after the
    change of colour, which comes with the chunk `change` (N,)."""

    latents: torch.Tensor
    text: torch.Tensor
    change: torch.Tensor


@dataclass
class Sequences:
    """B sequences of n chunks, cut from clips. Their first chunk is a clip's first, the second is from anywhere in it.

    clean (B, n, z, frames, h, w). context: the same, as later chunks see it. clean_late and noisy_late (B, n) bool: whether
    a chunk as context and as target has the later caption, of captions (2, B, tokens, width). weight (B, n): 0 where there
    is nothing to learn from. changed (B, n) bool: the two chunks from a change on. first (B,): the first chunk that may be the
    model's own.
    """

    clean: torch.Tensor
    context: torch.Tensor
    clean_late: torch.Tensor
    noisy_late: torch.Tensor
    captions: torch.Tensor
    weight: torch.Tensor
    changed: torch.Tensor
    first: torch.Tensor

    def rows(self, index: slice) -> Sequences:
        """Some of the sequences."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {name: value[:, index] if name == "captions" else value[index] for name, value in values.items()}
        return Sequences(**cut)

    def text(self, late: torch.Tensor) -> torch.Tensor:
        """The captions that `late` (B, k) chooses: (B, k, tokens, width)."""
        early, later = self.captions[:, :, None]
        return torch.where(late[..., None, None], later, early)


def frames_of(chunks: int, chunk: int) -> int:
    """Frames that belong to so many chunks of latents: the first latent has one, the others two each."""
    return 2 * chunks * chunk - 1


def build_clips(run: Run, config: CausalConfig, size: int, pipe: WanPipeline) -> Clips:
    """Render, encode and caption. Fewer than `config.clips`, when they would take longer than `config.data_seconds`."""
    begun = time.monotonic()
    frames = frames_of(config.clip_chunks, config.chunk)
    vae: Any = pipe.vae
    z = vae.config.z_dim
    mean, std = (
        torch.tensor(values, device=run.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    if run.device.type == "cuda":
        use_channels_last(vae)
    whole = WholeClipVae(vae)
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32
    latents = torch.empty(
        config.clips, config.clip_chunks, z, config.chunk, size // 4, size // 4, dtype=dtype, device=run.device
    )
    texts, changes = [], []
    done, block = 0, config.clip_block
    while done < config.clips and (done == 0 or time.monotonic() - begun < config.data_seconds):
        count = min(block, config.clips - done)
        scenes, after, change = draw_scenes(config, (run.seed, 61, done), count, frames)
        for first in range(0, count, config.encode_batch):
            part = slice(first, min(first + config.encode_batch, count))
            video = render(take(scenes, part), run.device, size)
            with torch.no_grad(), run.autocast():
                encoded = whole.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].float()
            chunks = ((encoded - mean) / std).unflatten(2, (config.clip_chunks, config.chunk)).transpose(1, 2)
            latents[done + first : done + first + len(chunks)] = chunks.to(dtype)
        before = {**scenes, **{key: scenes[key][:, 0] for key in ("colour0", "background")}}
        texts.append(_captions(run, config, pipe, before, after, done))
        changes.append(torch.from_numpy(change).to(run.device))
        done += count
        run.sync()
    whole.close()
    run.say(f"causal: {done} clips of {frames} frames ready in {time.monotonic() - begun:.1f} s")
    return Clips(latents[:done], torch.cat(texts, 1), torch.cat(changes))


def draw_scenes(
    config: CausalConfig, seed: tuple[int, ...], count: int, frames: int, held_out: str = "exclude"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Scenes with colours by frame, the scenes after the change, and the chunk of the change (NEVER for most)."""
    rng = np.random.default_rng((*seed, 1))
    scenes = continuing_scenes(count, seed, frames=frames, two_objects=config.two_objects, held_out=held_out)
    change = rng.integers(1, config.clip_chunks, count)
    change = np.where(rng.random(count) < config.changes, change, NEVER)
    scenes, after = change_colours(scenes, (*seed, 2), 2 * config.chunk * change - 1)
    return scenes, after, change


@torch.no_grad()
def _captions(
    run: Run, config: CausalConfig, pipe: WanPipeline, before: Scenes, after: Scenes, key: int
) -> torch.Tensor:
    states = []
    for which, scenes in enumerate((before, after)):
        for variant in range(config.caption_variants):
            texts, _ = captions_and_labels(scenes, (run.seed, 62, key, which, variant))
            states.append(encode_text(pipe.text_encoder, *tokenize(pipe.tokenizer, texts, run.device)))
    whole = torch.stack(states, 1).unflatten(1, (2, config.caption_variants)).transpose(0, 1)
    return whole.half() if run.device.type == "cuda" else whole


def draw_sequences(clips: Clips, config: CausalConfig, count: int, generator: torch.Generator) -> Sequences:
    """Cut sequences of `config.chunks` chunks.

    Half of them are the beginning of a clip. In the others the second chunk comes from later in the clip: that is how a sink from
    long ago stands before a window. Where a change of colour is near, it mostly falls into the sequence.
    """
    device = clips.latents.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    n = config.chunks
    rows = torch.randint(len(clips.latents), (count,), generator=generator, device=device)
    last = clips.latents.shape[1] - (n - 1)
    start = torch.where(uniform(count) < 0.5, 1.0, 2 + uniform(count) * (last - 1)).long().clamp(max=last)
    change = clips.change[rows]
    around = (change - (uniform(count) * (n - 1)).long()).clamp(1, last)
    start = torch.where((change < NEVER) & (uniform(count) < 0.85), around, start)
    index = torch.cat([torch.zeros_like(start)[:, None], start[:, None] + torch.arange(n - 1, device=device)], 1)
    clean = clips.latents[rows[:, None], index].float()
    variant = torch.randint(clips.text.shape[2], (2, count), generator=generator, device=device)
    captions = torch.stack([clips.text[which, rows, variant[which]] for which in (0, 1)]).float()
    late = index >= change[:, None]
    # After a change of prompt, a stream computes the window's keys anew with the new prompt, over pictures of the old one, or
    # leaves them: both occur. In the first case the chunks before the change are context alone, not targets.
    anew = (uniform(count) < 0.5) & late.any(1)
    after_sink = torch.arange(n, device=device) > 0
    clean_late = late | (anew[:, None] & after_sink)
    weight = torch.ones_like(late, dtype=torch.float32)
    weight[:, 1] = (start == 1).float()  # what follows a gap cannot be known
    weight[:, 1:] *= 1 - (anew[:, None] & ~late)[:, 1:].float()
    changed = late & (index < change[:, None] + 2)
    weight[changed] *= config.change_weight
    first = 1 + (start > 1).long()
    return Sequences(clean, clean, clean_late, late, captions, weight, changed, first)
