"""What the denoiser is trained on: noise levels, timesteps and the flow-matching loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import DenoiserConfig


@dataclass
class NoisePlan:
    """Noise level of every latent frame, (B, frames); zero marks a clean frame, which is a condition and not a target."""

    sigma: torch.Tensor
    per_frame: bool

    def timestep(self, tokens_per_frame: int) -> torch.Tensor:
        """What the stock model takes: one timestep per clip, or one per token."""
        if self.per_frame:
            return (self.sigma * 1000).repeat_interleave(tokens_per_frame, 1)
        return self.sigma[:, 0] * 1000


def draw_sigma(shape: tuple[int, ...], shift: float, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels, a tenth of them uniform, shifted towards more noise."""
    device = generator.device
    sigma = torch.sigmoid(torch.randn(shape, generator=generator, device=device))
    uniform = torch.rand(shape, generator=generator, device=device)
    sigma = torch.where(torch.rand(shape, generator=generator, device=device) < 0.1, uniform, sigma)
    return (shift * sigma / (1 + (shift - 1) * sigma)).clamp(1e-3, 1.0)


def draw_plan(
    batch: int, frames: int, config: DenoiserConfig, generator: torch.Generator, *, per_frame: bool
) -> NoisePlan:
    """One level per clip; or, per frame: a clean prefix, then one level for the rest or a level for every frame."""
    shared = draw_sigma((batch, 1), config.train_shift, generator).expand(batch, frames)
    if not per_frame:
        return NoisePlan(shared, per_frame=False)
    device = generator.device
    own = draw_sigma((batch, frames), config.train_shift, generator)
    independent = torch.rand((batch, 1), generator=generator, device=device) < 0.4
    sigma = torch.where(independent, own, shared)
    prefix = torch.randint(0, config.max_prefix + 1, (batch, 1), generator=generator, device=device)
    # A shared level without a clean frame is what the other batches train: give those clips one.
    prefix = torch.where(independent, prefix, prefix.clamp(min=1))
    clean = torch.arange(frames, device=device)[None] < prefix
    return NoisePlan(torch.where(clean, torch.zeros_like(sigma), sigma), per_frame=True)


def noised(latents: torch.Tensor, noise: torch.Tensor, plan: NoisePlan) -> torch.Tensor:
    """The straight line from data to noise, at each frame's level."""
    sigma = plan.sigma[:, None, :, None, None]
    return (1 - sigma) * latents + sigma * noise


def flow_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, plan: NoisePlan) -> torch.Tensor:
    """Squared error of the velocity, averaged over each clip's noisy frames and then over clips."""
    error = (velocity.float() - (noise - latents)).square().mean((1, 3, 4))
    noisy = (plan.sigma > 0).float()
    return ((error * noisy).sum(1) / noisy.sum(1)).mean()
