"""``AutoencoderKLWan`` (Wan 2.1 and 2.2), latent by latent: exact, as its convolutions are causal in time.

Each causal convolution sees the last two frames of its earlier inputs, which the stock decoder keeps in a list. The stock
``decode`` and ``encode`` empty that list at their beginning and end, so that a call for each chunk would lose frames (22 of 25
are left where four chunks should give 25).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilewise.plugins.autoencoders.wan_checks import why_stock
from tilewise.plugins.autoencoders.wan_fused import HISTORY, REPEAT, FusedPass
from tilewise.plugins.diffusers_compat import before_call, wan_patches, wan_vae_modules
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.hooks.forward_override import has_own_forward

GROUP = 4  # frames that the stock encoder takes at a time, after the first


class FeatureCache:
    """What a clip's convolutions have seen. Entries are replaced and not written to: a state holds what it held."""

    def __init__(self, module: Any) -> None:
        """module: the VAE's decoder or encoder."""
        conv = wan_vae_modules().conv
        self._empty: list[Any] = [None] * sum(isinstance(part, conv) for part in module.modules())
        self.entries: list[Any] = []
        self.begun = False
        self.reset()

    def reset(self) -> None:
        self.entries, self.begun = list(self._empty), False

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {str(i): entry for i, entry in enumerate(self.entries) if isinstance(entry, torch.Tensor)}
        repeat = [i for i, entry in enumerate(self.entries) if isinstance(entry, str)]
        return {**state, "repeat": torch.tensor(repeat, dtype=torch.int64), "begun": torch.tensor(self.begun)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """
        Raises:
            ConfigError: a state of another VAE. The cache is as it was.
        """
        entries = list(self._empty)
        try:
            numbers = {int(name): entry for name, entry in state.items() if name.isdigit()}
            for i, entry in {**numbers, **dict.fromkeys(state["repeat"].tolist(), REPEAT)}.items():
                entries[i] = entry
            begun = bool(state["begun"])
        except (KeyError, IndexError) as error:
            raise ConfigError(
                f"streaming: this is no state of a VAE with {len(entries)} causal convolutions ({error}); load it into the "
                "stream of the model that saved it"
            ) from error
        self.entries, self.begun = entries, begun


class _Clip:
    """What the decoder and the encoder of a clip have in common."""

    name = "wan"
    exact = True
    normalised = False

    def __init__(self, vae: Any, module: Any, fuse: bool) -> None:
        self.vae = vae
        self.fuse = fuse
        self._cache = FeatureCache(module)
        self._shape: tuple[int, ...] | None = None
        self._failed = False

    def reset(self) -> None:
        """Begin a new clip."""
        self._cache.reset()
        self._shape, self._failed = None, False

    @contextmanager
    def _call(self) -> Iterator[list[Any]]:
        """The entries of the cache, for one call. They are changed in place: a second set of them would be gigabytes at 720p."""
        if self._failed:
            raise TilewiseError(
                "streaming: an earlier call of this clip failed half-way, and its feature cache is of no use. Call reset(), or "
                "load_state_dict() of a state from before"
            )
        self._failed = True
        before_call(self.vae)
        yield self._cache.entries
        self._cache.begun, self._failed = True, False

    def _check(self, x: torch.Tensor, what: str, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or not x.shape[2]:
            raise ConfigError(f"{what}: needs (B, {channels}, T, height, width) with T ≥ 1, got {tuple(x.shape)}")
        shape = (x.shape[0], *x.shape[3:])
        if self._cache.begun and self._shape not in (None, shape):
            raise ConfigError(
                f"{what}: a clip of batch, height and width {self._shape} cannot go on with {shape}; call reset() first"
            )
        self._shape = shape

    def _run(self, module: Any, x: torch.Tensor, entries: list[Any], first: bool, encode: bool) -> torch.Tensor:
        """One call of the VAE's decoder or encoder; either may find fused code of a patch on it."""
        if self.fuse and has_own_forward(module) and why_stock(module, x) is None:
            fused = FusedPass(entries, first)
            return fused.encode(module, x) if encode else fused.decode(module, x)
        out: torch.Tensor = module(
            x, feat_cache=entries, feat_idx=[0], **({"first_chunk": True} if first and not encode else {})
        )
        return out


class WanStreamingDecoder(_Clip):
    """See ``StreamingDecoder``. One latent at a time, as in the stock decoder: chunks of any size give the same bits.

    After an exception in mid-call the clip cannot go on: ``reset`` it, or load a state.
    """

    def __init__(self, vae: Any, fuse: bool = True) -> None:
        super().__init__(vae, vae.decoder, fuse)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae, frames = self.vae, []
        self._check(latents, "decode", vae.config.z_dim)
        with self._call() as entries:
            for i, latent in enumerate(latents.split(1, 2)):
                first = not self._cache.begun and i == 0
                frames.append(self._run(vae.decoder, vae.post_quant_conv(latent), entries, first, encode=False))
        return wan_patches(torch.cat(frames, 2), vae.config.patch_size, inverse=True).clamp(-1.0, 1.0)

    def flush(self) -> None:
        """Nothing waits."""

    def memory_bytes(self, height: int, width: int, batch: int = 1) -> int:
        """What the feature cache of a clip of so many pixels takes: two frames before each convolution over time."""
        decoder, ratio = self.vae.decoder, self.vae.config.scale_factor_spatial
        conv_kind = wan_vae_modules().conv
        pixels, values = (height // ratio) * (width // ratio), 0
        for part in (decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out):
            convs = [module for module in part.modules() if isinstance(module, conv_kind)]
            values += sum(HISTORY * conv.in_channels * pixels for conv in convs if conv.kernel_size[0] > 1)
            if getattr(part, "upsamplers", None) or getattr(part, "upsampler", None):
                pixels *= 4
        return batch * values * decoder.conv_in.weight.element_size()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._cache.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._cache.load_state_dict(state)
        self._shape, self._failed = None, False


class WanStreamingEncoder(_Clip):
    """See ``StreamingEncoder``. The first frame alone and then four at a time, as in the stock encoder."""

    group = GROUP

    def __init__(self, vae: Any, fuse: bool = True) -> None:
        super().__init__(vae, vae.encoder, fuse)
        self._waiting: torch.Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self._waiting = None

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        self._check(frames, "encode", 3)
        waiting = frames if self._waiting is None else torch.cat([self._waiting, frames], 2)
        latents, first = [], not self._cache.begun
        with self._call() as entries:
            while waiting.shape[2] >= (count := 1 if first else GROUP):
                x = wan_patches(waiting[:, :, :count], vae.config.patch_size, inverse=False)
                moments = self._run(vae.encoder, x, entries, first, encode=True)
                latents += [vae.quant_conv(part)[:, : vae.config.z_dim] for part in moments.split(1, 2)]
                waiting, first = waiting[:, :, count:], False
        self._waiting = waiting.clone()
        if latents:
            return torch.cat(latents, 2)
        ratio = vae.config.scale_factor_spatial
        size = (frames.shape[0], vae.config.z_dim, 0, frames.shape[3] // ratio, frames.shape[4] // ratio)
        return frames.new_empty(size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {**self._cache.state_dict(), **waiting}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._cache.load_state_dict({name: entry for name, entry in state.items() if name != "waiting"})
        self._waiting, self._shape, self._failed = state.get("waiting"), None, False
