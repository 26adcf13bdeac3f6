"""``AutoencoderKLCogVideoX``, two latents at a time: exact for clips of an odd number of latents, which CogVideoX makes.

The stock ``decode`` goes through a clip in groups of two latents, of three at its beginning, and hands each group's convolutions
the last frames of the one before (``conv_cache``). Group norms see a whole group: other groups would give other frames.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.plugins.diffusers_compat import before_call
from tilewise.plugins.errors import ConfigError


class CogVideoXStreamingDecoder:
    """See ``StreamingDecoder``. Latents that are not a whole group wait for the next call, and are decoded by none if none comes:
    one of them is left over where a clip has an even number."""

    name = "cogvideox"
    exact = True
    normalised = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._group = int(vae.num_latent_frames_batch_size)
        self._cache: dict[str, Any] | None = None
        self._waiting: torch.Tensor | None = None

    def reset(self) -> None:
        self._cache = self._waiting = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        channels = self.vae.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.shape[2]:
            raise ConfigError(f"decode: needs (B, {channels}, T, height, width) with T ≥ 1, got {tuple(latents.shape)}")
        before_call(self.vae)
        waiting = latents if self._waiting is None else torch.cat([self._waiting, latents], 2)
        cache, frames = self._cache, []
        while waiting.shape[2] >= (count := self._group + (cache is None)):
            group, waiting = waiting[:, :, :count], waiting[:, :, count:]
            group_frames, cache = self._run(group, cache)
            frames.append(group_frames)
        self._cache, self._waiting = cache, waiting.clone()
        if frames:
            return torch.cat(frames, 2).clamp(-1.0, 1.0)
        ratio = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return latents.new_empty(latents.shape[0], 3, 0, latents.shape[3] * ratio, latents.shape[4] * ratio)

    @torch.no_grad()
    def flush(self) -> torch.Tensor | None:
        """The frames of a clip that is shorter than one group."""
        waiting, cache = self._waiting, self._cache
        self.reset()
        if waiting is None or cache is not None or not waiting.shape[2]:
            return None
        before_call(self.vae)
        return self._run(waiting, None)[0].clamp(-1.0, 1.0)

    def _run(self, group: torch.Tensor, cache: dict[str, Any] | None) -> tuple[torch.Tensor, dict[str, Any]]:
        if self.vae.post_quant_conv is not None:
            group = self.vae.post_quant_conv(group)
        frames, cache = self.vae.decoder(group, conv_cache=cache)
        return frames, cache or {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {**waiting, **(_flat(self._cache, "cache") if self._cache is not None else {})}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ConfigError: a state of something else. The clip is as it was.
        """
        if other := [name for name in state if name != "waiting" and not name.startswith("cache/")]:
            raise ConfigError(f"streaming: this is no state of a CogVideoX decoder: it has {', '.join(sorted(other))}")
        cache: dict[str, Any] = {}
        for name, tensor in state.items():
            *path, last = name.split("/")[1:] or [""]
            inner = cache
            for part in path:
                inner = inner.setdefault(part, {})
            if last:
                inner[last] = tensor
        self._cache, self._waiting = cache or None, state.get("waiting")


def _flat(cache: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """Nested dictionaries of tensors with one name each, such as "cache/mid_block/resnet_0/conv1"."""
    flat: dict[str, torch.Tensor] = {}
    for name, entry in cache.items():
        if isinstance(entry, dict):
            flat |= _flat(entry, f"{prefix}/{name}")
        elif entry is not None:
            flat[f"{prefix}/{name}"] = entry
    return flat
