"""``AutoencoderKLWan`` (Wan 2.1 and 2.2), latent by latent: exact, as its convolutions are causal in time.

Each causal convolution sees the last two frames of its earlier inputs, which the stock decoder keeps in a list. The stock
``decode`` empties that list at its beginning and end, so that a call for each chunk would lose frames
(22 of 25).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

REPEAT = "Rep"  # stands in the list where an upsampling has seen the first latent and nothing else


class WanStreamingDecoder:
    """See ``StreamingDecoder``. One latent at a time, as in the stock decoder: chunks of any size give the same bits."""

    name = "wan"
    exact = True

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._entries = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._cache: list[Any] = []
        self._begun = False
        self.reset()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae, frames = self.vae, []
        for latent in latents.split(1, 2):
            x = vae.post_quant_conv(latent)
            first = {} if self._begun else {"first_chunk": True}
            frames.append(vae.decoder(x, feat_cache=self._cache, feat_idx=[0], **first))
            self._begun = True
        video = torch.cat(frames, 2)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def reset(self) -> None:
        self._cache, self._begun = [None] * self._entries, False

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {str(i): entry for i, entry in enumerate(self._cache) if isinstance(entry, torch.Tensor)}
        state["repeat"] = torch.tensor([i for i, entry in enumerate(self._cache) if entry == REPEAT], dtype=torch.int64)
        state["begun"] = torch.tensor(self._begun)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.reset()
        for name, entry in state.items():
            if name.isdigit():
                self._cache[int(name)] = entry
        for i in state["repeat"].tolist():
            self._cache[i] = REPEAT
        self._begun = bool(state["begun"])
