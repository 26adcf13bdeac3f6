"""A video VAE that decodes latents as they come: consecutive calls continue one clip.

``streaming_decoder(vae)`` finds the decoder for a VAE. Its feature cache belongs to the decoder and not to the VAE's module, so
that streams and ordinary decodes of one VAE do not disturb each other.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tilewise.plugins.autoencoders.wan import WanStreamingDecoder
from tilewise.plugins.errors import UnsupportedModelError


class StreamingDecoder(Protocol):
    """What decodes one clip.

    Attributes:
        name: which decoder this is. exact: whether the frames are those of a whole decode.
    """

    name: str
    exact: bool

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next frames of the clip.

        Args:
            latents: (B, C, T, h, w) in the VAE's own units and dtype, any T ≥ 1.

        Returns:
            (B, 3, F, H, W) in −1 … 1: one frame of the clip's first latent, as many as the VAE has in a latent of every other.
        """

    def reset(self) -> None:
        """Begin a new clip."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on bit for bit, not copied."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a ``state_dict``, on the device that its tensors are on."""


def streaming_decoder(vae: Any) -> StreamingDecoder:
    """The decoder of one clip for a VAE.

    Raises:
        UnsupportedModelError: for a VAE that cannot go on where it stopped.
    """
    if type(vae).__name__ == "AutoencoderKLWan":
        return WanStreamingDecoder(vae)
    raise UnsupportedModelError(
        f"streaming: {type(vae).__name__} cannot decode a clip bit by bit here; AutoencoderKLWan can"
    )
