"""Stages `vae` (encoder and decoder together) and `decoder` (the decoder alone, for latents that are already in use)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from diffusers import AutoencoderKLWan

from . import checkpoints
from .config import Config
from .loop import Limits, Run, train, warmup_then
from .muon import Muon
from .render import render
from .scenes import sample_scenes, take
from .whole_clip_vae import WholeClipVae, build_vae, psnr, use_channels_last


class _ClipPool:
    """Rendered clips kept as bytes on the device."""

    def __init__(self, run: Run, config: Config, key: int) -> None:
        scenes = sample_scenes(config.vae.clips, (run.seed, key), frames=config.clip.frames, two_objects=0.25)
        size = config.clip.size
        self.clips = torch.empty(
            config.vae.clips, 3, config.clip.frames, size, size, dtype=torch.uint8, device=run.device
        )
        for start in range(0, config.vae.clips, 128):
            part = render(take(scenes, slice(start, start + 128)), run.device, size)
            self.clips[start : start + 128] = (part * 127.5 + 127.5).round().to(torch.uint8)

    def batch(self, index: torch.Tensor, top: int, left: int, size: int) -> torch.Tensor:
        clips = self.clips[:, :, :, top : top + size, left : left + size][index]
        return (clips.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last_3d)


def reconstruction_loss(error: torch.Tensor, square: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute and squared error, and the error of differences in space and time (edges, flicker). Also the plain MSE."""
    mse = error.square().mean()
    edges = sum(torch.diff(error, dim=dim).abs().mean() for dim in (2, 3, 4))
    return error.abs().mean() + square * mse + 0.5 * edges, mse


def _psnr_of(mse: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10(mse.detach() / 4)


class _Optimizers:
    """Muon for the convolution kernels, AdamW for biases and for the norms (whose weights are (channels, 1, 1, 1))."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], run: Run, config: Config) -> None:
        self.sizes = config.vae
        self.parameters = list(parameters)
        kernels = [p for p in self.parameters if p.ndim >= 4 and p[0].numel() > 1]
        chosen = {id(p) for p in kernels}
        self.muon = Muon(kernels, weight_decay=0.0)
        self.adam = torch.optim.AdamW(
            [p for p in self.parameters if id(p) not in chosen],
            lr=config.vae.adam_lr,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=run.device.type == "cuda",
        )

    def state(self) -> checkpoints.Tensors:
        return {
            **checkpoints.prefixed("muon", self.muon.state()),
            **checkpoints.prefixed("adam", checkpoints.adam_state(self.adam)),
        }

    def load(self, tensors: checkpoints.Tensors) -> None:
        self.muon.load(checkpoints.under("muon", tensors))
        checkpoints.load_adam_state(self.adam, checkpoints.under("adam", tensors))

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step(self.sizes.muon_lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.sizes.adam_lr * factor
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None


class _VaeTrainee:
    """Trains on crops mostly, on whole frames sometimes (more towards the end), so that borders are learnt too."""

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config
        torch.manual_seed(run.seed + 1)
        self.vae = build_vae(config).to(run.device)
        use_channels_last(self.vae)
        self.whole = WholeClipVae(self.vae)
        self.forward = torch.compile(self._forward, dynamic=False) if run.compile else self._forward
        self.pool = _ClipPool(run, config, 21)
        self.optimizers = _Optimizers(self.vae.parameters(), run, config)

    def state(self) -> checkpoints.Tensors:
        return {
            **checkpoints.prefixed("vae", self.vae.state_dict()),
            **self.optimizers.state(),
        }

    def load(self, tensors: checkpoints.Tensors) -> None:
        self.vae.load_state_dict(checkpoints.under("vae", tensors))
        self.optimizers.load(tensors)

    def _forward(self, video: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.whole.encode(video)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss, mse = reconstruction_loss(
            self.whole.decode(mean + noise * torch.exp(0.5 * log_variance)).float() - video, square=4.0
        )
        return loss + self.config.vae.kl * kl, mse

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]:
        vae, clip = self.config.vae, self.config.clip
        progress = step / horizon
        factor = warmup_then(step, 100, 0.5 + 0.5 * math.cos(math.pi * progress) + 0.002)
        host = torch.Generator().manual_seed(self.run.seed * 7919 + step)
        whole = float(torch.rand((), generator=host)) < (0.15 if progress < 0.7 else 0.5)
        count, size = (vae.full_batch, clip.size) if whole else (vae.crop_batch, vae.crop)
        corner = torch.randint(0, (clip.size - size) // 2 + 1, (2,), generator=host) * 2
        generator = self.run.generator(2, step)
        index = torch.randint(len(self.pool.clips), (count,), generator=generator, device=self.run.device)
        video = self.pool.batch(index, int(corner[0]), int(corner[1]), size)
        shape = (count, vae.z_dim, (clip.frames - 1) // 2 + 1, size // 4, size // 4)
        noise = torch.randn(shape, generator=generator, device=self.run.device)
        with self.run.autocast():
            loss, mse = self.forward(video, noise)
        loss.backward()
        self.optimizers.step(factor)
        return {"psnr": _psnr_of(mse)}


def train_vae(run: Run, config: Config, limits: Limits) -> bool:
    """Run the stage; writes `vae.safetensors` (with the latents' statistics among its facts) and `vae.json`."""
    trainee = _VaeTrainee(run, config)
    if not train(run, "vae", trainee, limits, skip=60, measure=120):
        return False
    mean, std = latent_statistics(run, config, trainee.whole)
    _finish(run, config, trainee.whole.close(), "vae", {"latents_mean": mean, "latents_std": std})
    return True


class _DecoderTrainee:
    """Fine-tunes the decoder on noisy latents of the frozen encoder: the denoiser's are never exact either."""

    def __init__(self, run: Run, config: Config) -> None:
        self.run, self.config = run, config
        self.vae, facts = load_vae(run, config, "vae")
        self.facts = facts
        use_channels_last(self.vae)
        self.vae.requires_grad_(False)
        self.whole = WholeClipVae(self.vae)
        self.parameters = [*self.vae.decoder.parameters(), *self.vae.post_quant_conv.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.forward = torch.compile(self._forward, dynamic=False) if run.compile else self._forward
        self.pool = _ClipPool(run, config, 22)
        self.std = torch.tensor(facts["latents_std"], device=run.device).view(1, -1, 1, 1, 1)
        self.optimizers = _Optimizers(self.parameters, run, config)

    def state(self) -> checkpoints.Tensors:
        return {
            **checkpoints.prefixed("vae", self.vae.state_dict()),
            **self.optimizers.state(),
        }

    def load(self, tensors: checkpoints.Tensors) -> None:
        self.vae.load_state_dict(checkpoints.under("vae", tensors))
        self.optimizers.load(tensors)

    def _forward(self, video: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            mean = self.whole.encode(video)[0].float()
        decoded = self.whole.decode(mean + 0.02 * self.std * noise).float()
        return reconstruction_loss(decoded - video, square=10.0)

    def step(self, step: int, horizon: int) -> Mapping[str, torch.Tensor]:
        vae, clip = self.config.vae, self.config.clip
        factor = warmup_then(step, 100, 0.5 + 0.5 * math.cos(math.pi * step / horizon) + 0.002)
        generator = self.run.generator(3, step)
        index = torch.randint(len(self.pool.clips), (vae.decoder_batch,), generator=generator, device=self.run.device)
        video = self.pool.batch(index, 0, 0, clip.size)
        shape = (vae.decoder_batch, vae.z_dim, (clip.frames - 1) // 2 + 1, clip.size // 4, clip.size // 4)
        noise = torch.randn(shape, generator=generator, device=self.run.device)
        with self.run.autocast():
            loss, mse = self.forward(video, noise)
        loss.backward()
        self.optimizers.step(factor * vae.decoder_rate)
        return {"psnr": _psnr_of(mse)}


def train_decoder(run: Run, config: Config, limits: Limits) -> bool:
    """Run the stage; writes `decoder.safetensors`, the same VAE with a better decoder, and `decoder.json`."""
    trainee = _DecoderTrainee(run, config)
    if not train(run, "decoder", trainee, limits, skip=60, measure=60):
        return False
    _finish(run, config, trainee.whole.close(), "decoder", trainee.facts)
    return True


def _finish(run: Run, config: Config, vae: AutoencoderKLWan, name: str, facts: dict) -> None:
    scores = held_out_psnr(run, config, vae.eval())
    run.say(f"{name}: held-out PSNR", scores)
    checkpoints.save(run.path(f"{name}.safetensors"), vae.state_dict(), facts)
    checkpoints.write_json(run.path(f"{name}.json"), {"psnr": scores, **facts})


def held_out_psnr(run: Run, config: Config, vae: AutoencoderKLWan) -> dict[str, float]:
    """Mean and worst PSNR over clips that were not trained on, by the stock chunked path."""
    scenes = sample_scenes(config.evaluation.vae_clips, (run.seed, 23), frames=config.clip.frames, held_out="only")
    values = psnr(vae, render(scenes, run.device, config.clip.size))
    return {"mean": round(float(values.mean()), 2), "min": round(float(values.min()), 2)}


@torch.no_grad()
def latent_statistics(run: Run, config: Config, whole: WholeClipVae) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, for the pipeline to normalise with."""
    count = min(2048, max(8, config.vae.clips))
    scenes = sample_scenes(count, (run.seed, 24), frames=config.clip.frames)
    parts = []
    for start in range(0, count, 64):
        video = render(take(scenes, slice(start, start + 64)), run.device, config.clip.size)
        with run.autocast():
            parts.append(whole.encode(video.contiguous(memory_format=torch.channels_last_3d))[0].float())
    latents = torch.cat(parts)
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()


def load_vae(run: Run, config: Config, name: str | None = None) -> tuple[AutoencoderKLWan, dict]:
    """The trained VAE and its facts; the fine-tuned one if there is one and no name is given."""
    if name is None:
        name = "decoder" if run.path("decoder.safetensors").exists() else "vae"
    tensors, facts = checkpoints.load(run.path(f"{name}.safetensors"), run.device)
    vae = build_vae(config)
    vae.load_state_dict(tensors)
    vae.register_to_config(latents_mean=facts["latents_mean"], latents_std=facts["latents_std"])
    return vae.to(run.device).eval(), facts
