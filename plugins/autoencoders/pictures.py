"""``AutoencoderKL``, of pictures: each latent is a frame by itself, as AnimateDiff's are. Exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.plugins.diffusers_compat import before_call
from tilewise.plugins.errors import ConfigError

AT_ONCE = 4  # pictures: more take more memory, and little less time


class _Clip:
    """Keeps nothing: no picture depends on another."""

    name = "pictures"
    exact = True
    normalised = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def reset(self) -> None:
        return

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ConfigError: a state of something else.
        """
        if state:
            raise ConfigError(f"streaming: this is no state of a VAE of pictures: it has {', '.join(sorted(state))}")

    @torch.no_grad()
    def _by_picture(self, x: torch.Tensor, channels: int, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """run over (n, C, h, w) of (B, C, T, h, w), as a video again."""
        if x.ndim != 5 or x.shape[1] != channels or not x.shape[2]:
            raise ConfigError(f"streaming: needs (B, {channels}, T, height, width) with T ≥ 1, got {tuple(x.shape)}")
        before_call(self.vae)
        pictures = x.transpose(1, 2).flatten(0, 1)
        made = torch.cat([run(part) for part in pictures.split(AT_ONCE)])
        return made.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class PictureStreamingDecoder(_Clip):
    """See ``StreamingDecoder``."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        frames = self._by_picture(
            latents, self.vae.config.latent_channels, lambda part: self.vae.decode(part, return_dict=False)[0]
        )
        return frames.clamp(-1.0, 1.0)

    def flush(self) -> torch.Tensor | None:
        return None


class PictureStreamingEncoder(_Clip):
    """See ``StreamingEncoder``."""

    group = 1

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return self._by_picture(frames, 3, lambda part: self.vae.encode(part).latent_dist.mode())
