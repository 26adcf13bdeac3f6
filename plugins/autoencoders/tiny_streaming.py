"""A tiny video autoencoder that decodes latents as they come."""

from __future__ import annotations

import torch

from tilewise.plugins.autoencoders.tiny import BLOCKS, STAGES, TinyDecoder
from tilewise.plugins.errors import ConfigError

MEMORIES = BLOCKS * STAGES


class TinyStreamingDecoder:
    """See ``StreamingDecoder``. One latent at a time, whatever the size of a chunk: chunks of any size give the same bits.

    Of the clip's first latent the last frame alone is kept, as the VAEs that these decoders stand for make one of it. A call that
    fails leaves the clip as it was before.
    """

    name = "tiny"
    exact = True
    normalised = True

    def __init__(self, decoder: TinyDecoder, sha256: str = "") -> None:
        """sha256: of the file that the decoder is from."""
        self.decoder, self.sha256 = decoder, sha256
        self._memory: list[torch.Tensor | None] = [None] * MEMORIES

    def reset(self) -> None:
        """Begin a new clip."""
        self._memory = [None] * MEMORIES

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next frames of the clip.

        Args:
            latents: (B, C, T, h, w), normalised, in the decoder's dtype, any T ≥ 1.

        Returns:
            (B, 3, F, H, W) in −1 … 1: one frame of the clip's first latent, ``shape.temporal`` of every other.

        Raises:
            ConfigError: latents of another number of channels, or of another batch or size than the clip's.
        """
        channels, memory, frames = self.decoder.shape.channels, self._memory, []
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.shape[2]:
            raise ConfigError(f"decode: needs (B, {channels}, T, height, width) with T ≥ 1, got {tuple(latents.shape)}")
        if (before := memory[0]) is not None:
            own, new = (before.shape[0], *before.shape[2:]), (latents.shape[0], *latents.shape[3:])
            if own != new:
                raise ConfigError(
                    f"decode: a clip of batch, height and width {own} cannot go on with {new}; call reset() first"
                )
        for latent in latents.unbind(2):
            first = memory[0] is None
            made, memory = self.decoder(latent.contiguous(), memory)
            frames.append(made[:, :, -1:] if first else made)
        self._memory = memory
        return torch.cat(frames, 2)

    def flush(self) -> None:
        """Nothing waits."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"memory.{i}": last for i, last in enumerate(self._memory) if last is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ConfigError: a state of something else. The clip is as it was.
        """
        names = [f"memory.{i}" for i in range(MEMORIES)]
        if set(state) not in (set(), set(names)):
            raise ConfigError(f"streaming: this is no state of a tiny decoder: it has {', '.join(sorted(state))}")
        self._memory = [state.get(name) for name in names]
