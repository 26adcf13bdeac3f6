"""Every number of the recipe in one place: what is trained on what, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class ClipConfig:
    """The clips the model learns: frames must be 4k + 1, because the stock VAE encodes one frame and then fours."""

    frames: int = 17
    size: int = 128
    two_objects: float = 0.15


@dataclass(frozen=True)
class TextConfig:
    """The UMT5 text encoder and its pre-training on naming a caption's attributes."""

    width: int = 128
    heads: int = 4
    d_ff: int = 384
    layers: int = 2
    captions: int = 200_000
    batch: int = 256
    steps: int = 2500
    lr: float = 3e-3


@dataclass(frozen=True)
class VaeConfig:
    """The autoencoder: 2×2 pixels become channels, one more 2× in space and 2× in time is learnt."""

    base_dim: int = 32
    z_dim: int = 12
    clips: int = 12_000
    crop: int = 64
    crop_batch: int = 16
    full_batch: int = 4
    steps: int = 20_000
    muon_lr: float = 5e-3
    adam_lr: float = 2e-3
    kl: float = 5e-5
    decoder_batch: int = 6
    decoder_steps: int = 10_000
    decoder_rate: float = 0.5  # of the learning rates above


@dataclass(frozen=True)
class DenoiserConfig:
    """The diffusion transformer and its training."""

    heads: int = 4
    head_dim: int = 64
    layers: int = 8
    ffn: int = 1024
    freq_dim: int = 128
    clips: int = 60_000
    caption_variants: int = 4
    batch: int = 64
    steps: int = 12_000
    warmup: int = 200
    decay_from: float = 0.15
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    text_lr: float = 3e-4
    attribute_weight: float = 0.02
    ema: float = 0.999
    text_dropout: float = 0.10
    per_frame: float = 0.30
    max_prefix: int = 6
    text_lengths: tuple[int, ...] = (32, 512)
    train_shift: float = 2.0
    sample_shift: float = 3.0


@dataclass(frozen=True)
class CausalConfig:
    """The causal few-step mode: a LoRA on the finished denoiser. Lengths in chunks of `chunk` latent frames."""

    rank: int = 64
    chunk: int = 3
    clips: int = 8000
    clip_chunks: int = 16
    clip_block: int = 512
    encode_batch: int = 32
    data_seconds: float = 50.0
    caption_variants: int = 3
    two_objects: float = 0.1
    changes: float = 0.6  # share of clips in which a colour changes
    chunks: int = 8  # of a training sequence
    windows: tuple[tuple[int, int, float], ...] = (
        (4, 1, 0.5),
        (7, 1, 0.3),
        (3, 1, 0.2),
    )  # window, sink, share of steps
    batch: int = 8
    steps: int = 20_000
    warmup: int = 100
    lr: float = 1e-3
    decay_from: float = 0.4
    ema: float = 0.995
    context_noise: float = 0.15  # at most, in half of the sequences
    grid_share: float = 0.5  # of noise levels that are those of sampling
    change_weight: float = 2.0  # in the loss, of the two chunks after a change
    guidance_weight: float = 0.55  # guidance 1 / (1 − weight), learnt into the first chunk
    change_guidance: float = 0.35  # the same, away from the old caption, in the two chunks after a change
    guidance_from: float = 0.05
    rollouts_from: float = 0.4
    rollout_pool: int = 64
    rollout_steps: int = 8
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    first_steps: int = 12
    shift: float = 3.0
    solver: str = "euler"
    prompts: int = 64
    frames: int = 240


@dataclass(frozen=True)
class EvaluationConfig:
    """How the finished model is scored."""

    prompts: int = 64
    steps: int = 20
    guidance: float = 3.0  # more flattens the backgrounds' patterns
    text_tokens: int = 32
    fps: int = 8
    batch: int = 16
    prefix_frames: int = 5
    vae_clips: int = 64


@dataclass(frozen=True)
class Config:
    """One preset."""

    name: str = "full"
    seed: int = 0
    clip: ClipConfig = field(default_factory=ClipConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)


def tiny() -> Config:
    """Everything small enough for a test on one CPU core; the result is noise, the code path is the real one."""
    return Config(
        name="tiny",
        clip=ClipConfig(frames=5, size=32),
        text=TextConfig(width=32, heads=2, d_ff=32, layers=1, captions=200, batch=16, steps=6),
        vae=VaeConfig(
            base_dim=8, z_dim=4, clips=8, crop=16, crop_batch=2, full_batch=1, steps=4, decoder_batch=1, decoder_steps=3
        ),
        denoiser=DenoiserConfig(
            heads=2,
            head_dim=16,
            layers=2,
            ffn=32,
            freq_dim=16,
            clips=16,
            caption_variants=2,
            batch=4,
            steps=6,
            warmup=2,
            max_prefix=2,
            text_lengths=(32, 40),
        ),
        evaluation=EvaluationConfig(prompts=2, steps=2, batch=2, prefix_frames=2, vae_clips=2),
        causal=CausalConfig(
            rank=4,
            clips=4,
            clip_chunks=5,
            clip_block=4,
            encode_batch=4,
            caption_variants=1,
            chunks=4,
            windows=((3, 1, 1.0),),
            batch=2,
            steps=4,
            warmup=1,
            rollout_pool=2,
            rollout_steps=1,
            timesteps=(1000.0, 500.0),
            first_steps=2,
            prompts=2,
            frames=29,
        ),
    )


PRESETS = {"full": Config, "tiny": tiny}


def with_steps(config: Any, steps: int | None) -> Any:
    """The same stage configuration with another number of steps."""
    return config if steps is None else replace(config, steps=steps)
