"""A video VAE that decodes latents as they come: consecutive calls continue one clip.

``streaming_decoder(vae)`` finds the decoder for a VAE. Its feature cache belongs to the decoder and not to the VAE's module, so
that streams and ordinary decodes of one VAE do not disturb each other.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tilewise.plugins.autoencoders.blended import SERVED, BlendedStreamingDecoder
from tilewise.plugins.autoencoders.cogvideox import CogVideoXStreamingDecoder
from tilewise.plugins.autoencoders.pictures import PictureStreamingDecoder, PictureStreamingEncoder
from tilewise.plugins.autoencoders.wan import WanStreamingDecoder, WanStreamingEncoder
from tilewise.plugins.diffusers_compat import unwrapped, wan_vae_modules
from tilewise.plugins.errors import UnsupportedModelError

PICTURES = "AutoencoderKL"  # whose latents are a frame each


class StreamingDecoder(Protocol):
    """What decodes one clip.

    Attributes:
        name: which decoder this is. exact: whether the frames are those of a whole decode.
        normalised: whether it takes latents as the denoiser has them, not in the VAE's own units.
    """

    name: str
    exact: bool
    normalised: bool

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next frames of the clip.

        Args:
            latents: (B, C, T, h, w) in the VAE's own units (or ``normalised``) and dtype, any T ≥ 1.

        Returns:
            (B, 3, F, H, W) in −1 … 1: one frame of the clip's first latent, as many as the VAE has in a latent of every other.
            Decoders other than Wan's may keep some for the next call.

        Raises:
            ConfigError: latents of another shape than the clip's.
        """

    def flush(self) -> torch.Tensor | None:
        """The end of the clip: frames that waited for more latents, or None."""

    def reset(self) -> None:
        """Begin a new clip."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on bit for bit, not copied."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a ``state_dict``, on the device that its tensors are on."""


class StreamingEncoder(Protocol):
    """What encodes one clip, the other way round; ``reset`` and the state as for a decoder.

    group: frames that it takes at a time, after the first: fewer wait for more.
    """

    name: str
    exact: bool
    group: int

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """The next latents of the clip.

        Args:
            frames: (B, 3, F, H, W) in −1 … 1 in the VAE's dtype, any F ≥ 1. The clip's first makes a latent by itself; those that
                are not enough for the next one wait for the next call.

        Returns:
            (B, C, T, h, w), T ≥ 0: means of the posterior, in the VAE's own units.
        """

    def reset(self) -> None: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def streaming_decoder(vae: Any, *, fuse: bool = True) -> StreamingDecoder:
    """The decoder of one clip for a VAE: exact for Wan's, CogVideoX's and those of pictures (AutoencoderKL), blended (``exact``
    is False) for others with frames.

    It does not tile, except where a blended one calls a VAE's own ``decode``.

    Args:
        fuse: run fused kernels on a GPU that Triton serves, where they compute what the stock modules of a Wan VAE do; see
            ``wan_checks.why_stock``. A VAE with the fused kernels of ``tilewise.patch`` on it runs them in any case.

    Raises:
        UnsupportedModelError: for a VAE that decodes no frames, or not in parts.
    """
    vae = unwrapped(vae)
    name = type(vae).__name__
    if type(vae) is wan_vae_modules().autoencoder:
        return WanStreamingDecoder(vae, fuse)
    if name == "AutoencoderKLCogVideoX":
        return CogVideoXStreamingDecoder(vae)
    if name == PICTURES:
        return PictureStreamingDecoder(vae)
    if name in SERVED:
        return BlendedStreamingDecoder(vae)
    raise UnsupportedModelError(
        f"streaming: {name} cannot decode a clip bit by bit: it is not known here. "
        f"Served exactly: AutoencoderKLWan, AutoencoderKLCogVideoX, {PICTURES}; "
        f"blended: {', '.join(SERVED)}"
    )


def streaming_encoder(vae: Any, *, fuse: bool = True) -> StreamingEncoder:
    """The encoder of one clip for a VAE; arguments and errors as for ``streaming_decoder``."""
    vae = unwrapped(vae)
    if type(vae) is wan_vae_modules().autoencoder:
        return WanStreamingEncoder(vae, fuse)
    if type(vae).__name__ == PICTURES:
        return PictureStreamingEncoder(vae)
    raise UnsupportedModelError(
        f"streaming: {type(vae).__name__} cannot encode a clip bit by bit here; AutoencoderKLWan and {PICTURES} can"
    )
