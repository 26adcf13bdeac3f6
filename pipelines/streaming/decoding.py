"""Latents to frames in host memory, beside the next chunk's denoising.

On a GPU a chunk is decoded on a stream of its own, or on a device of its own, and its frames come to the host through pinned
memory: nothing waits until somebody reads them. On a CPU it is decoded at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.plugins.autoencoders.streaming import StreamingDecoder


class PendingFrames:
    """Frames that are on their way. keep: tensors that the device still reads."""

    def __init__(self, host: torch.Tensor, copied: Any, keep: tuple[torch.Tensor, ...]) -> None:
        self._host, self._copied, self._keep = host, copied, keep

    def result(self) -> NDArray[np.uint8]:
        """(F, H, W, 3); waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        self._keep = ()
        frames: NDArray[np.uint8] = self._host.numpy()
        return frames


class FrameDecoder:
    """Decodes the chunks of one stream in order.

    Args:
        decoder: of one clip; on the device that decodes.
        space, vae: whose latents they are.
    """

    def __init__(self, decoder: StreamingDecoder, space: LatentSpace, vae: Any, device: torch.device) -> None:
        self.decoder = decoder
        self.space = space
        self.vae = vae
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def submit(self, latents: torch.Tensor, *, new_clip: int = 0, last: bool = False) -> PendingFrames:
        """Begin to decode normalised latents (1, C, t, h, w).

        new_clip: above 0, they begin a clip, of which so many frames are not wanted. last: frames that wait for more latents come
        too.
        """
        if self._stream is None:
            return PendingFrames(_to_uint8(self._decode(latents, new_clip, last)), None, ())
        ready = torch.cuda.current_stream(latents.device).record_event() if latents.is_cuda else None
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            frames = _to_uint8(self._decode(latents, new_clip, last))
            # Pageable memory would make the copy wait for everything before it on the device.
            host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(frames, non_blocking=True)
            copied = self._stream.record_event()
        return PendingFrames(host, copied, (latents, frames))

    def _decode(self, latents: torch.Tensor, new_clip: int, last: bool) -> torch.Tensor:
        latents = latents.to(self.device, self.vae.dtype)
        if not self.decoder.normalised:
            mean, std = self.space.statistics(self.vae, latents)
            latents = latents * std + mean
        if new_clip:
            self.decoder.reset()
        video = self.decoder.decode(latents)
        if last and (rest := self.decoder.flush()) is not None:
            video = torch.cat([video, rest], 2)
        return video[:, :, new_clip:]


def _to_uint8(video: torch.Tensor) -> torch.Tensor:
    """(1, 3, F, H, W) in −1 … 1 to uint8 (F, H, W, 3), in float32 whatever the VAE's dtype, rounded as our files are.

    Diffusers' video processor computes in the VAE's dtype: equal for float32, a level or two off for others.
    """
    pixels = (video[0].float() / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
