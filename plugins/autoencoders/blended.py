"""Any VAE with frames, in overlapping windows of latents that are cross-faded: not exact, but without seams.

Each call decodes the last latents of the call before once more, in front of the new ones. In a window that begins in mid-clip the
first latent is as wrong as its context is missing, and of its frames none is used; the frames of the others in the overlap
are faded over from the window before. These have to wait until the next call has decoded them too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.plugins.errors import ConfigError

SERVED = (
    "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLLTXVideo", "AutoencoderKLMochi",
    "AutoencoderKLCosmos", "AutoencoderKLMagvit", "AutoencoderKLLTX2Video",
)  # fmt: skip


def frames_per_latent(vae: Any) -> int:
    """How many frames a latent has: of the attribute or the entry of the config that a VAE has for it."""
    ratio = getattr(vae, "temporal_compression_ratio", None) or vae.config.get("temporal_compression_ratio")
    return int(ratio or math.prod(vae.config.get("temporal_expansions", ())))


class BlendedStreamingDecoder:
    """See ``StreamingDecoder``. The frames of the last ``overlap − 1`` latents come with the next call, or with ``flush``."""

    name = "blended"
    exact = False
    normalised = False

    def __init__(self, vae: Any, overlap: int = 3) -> None:
        if overlap < 2:
            raise ConfigError(f"overlap must be at least 2 latents, got {overlap}")
        self.vae = vae
        self.overlap = overlap
        self.ratio = frames_per_latent(vae)
        self._before: torch.Tensor | None = None  # the last latents
        self._held: torch.Tensor | None = None  # the frames of all but the first of them

    def reset(self) -> None:
        self._before = self._held = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 5 or not latents.shape[2]:
            raise ConfigError(f"decode: needs (B, C, T, height, width) with T ≥ 1, got {tuple(latents.shape)}")
        window = latents if self._before is None else torch.cat([self._before, latents], 2)
        # LTX-Video's later decoders are told how much noise there is: none, as in a pipeline's call.
        level = (window.new_zeros(len(window)),) if self.vae.config.get("timestep_conditioning") else ()
        frames = self.vae.decode(window, *level, return_dict=False)[0].clamp(-1.0, 1.0)
        count = window.shape[2]
        lead = (
            frames.shape[2] - (count - 1) * self.ratio
        )  # frames of the window's first latent: 1, or as many as of any other
        if lead not in (1, self.ratio):
            raise ConfigError(
                f"decode: {count} latents gave {frames.shape[2]} frames, which is neither {1 + (count - 1) * self.ratio} nor "
                f"{count * self.ratio}; this VAE cannot be decoded in windows"
            )
        if self._held is not None:
            frames = frames[:, :, lead:]
            frames = torch.cat([_faded(self._held, frames), frames[:, :, self._held.shape[2] :]], 2)
        kept = min(self.overlap, count)
        wait = (kept - 1) * self.ratio
        self._before = window[:, :, -kept:].clone()
        self._held = frames[:, :, frames.shape[2] - wait :].clone()
        return frames[:, :, : frames.shape[2] - wait]

    def flush(self) -> torch.Tensor | None:
        """The frames that wait; the clip ends here."""
        held = self._held
        self.reset()
        return None if held is None or not held.shape[2] else held

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self._before is None or self._held is None else {"before": self._before, "held": self._held}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ConfigError: a state of something else. The clip is as it was.
        """
        if set(state) not in (set(), {"before", "held"}):
            raise ConfigError(f"streaming: this is no state of a blended decoder: it has {', '.join(sorted(state))}")
        self._before, self._held = state.get("before"), state.get("held")


def _faded(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """From ``before`` to the first frames of ``after``, linearly, with neither end alone."""
    count = before.shape[2]
    weight = torch.arange(1, count + 1, device=before.device).view(1, 1, -1, 1, 1) / (count + 1)
    return torch.lerp(before.float(), after[:, :, :count].float(), weight).to(before.dtype)
