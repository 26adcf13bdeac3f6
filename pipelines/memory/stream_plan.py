"""Plan the memory of a stream before it runs: whether it fits on its device.

    weights that are still to be loaded + KV caches + a chunk's forward + decoding

The caches are exact (plugins/streaming/cache_plan.py). A forward is estimated as for a clip, from the tokens of a chunk
(``estimate``), or is what a cache's policy copies between two chunks, if that is more. The decode is run on the meta device: two
latent frames, as every other one takes what the second does. On a GPU it runs beside the next chunk's forward, on a CPU after it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from tilewise.pipelines.latent_spaces.base import LatentSpace
from tilewise.pipelines.memory.estimate import forward_bytes, weight_bytes
from tilewise.pipelines.memory.plan import decode_peak, free_bytes
from tilewise.pipelines.memory.units import amount
from tilewise.plugins.diffusers_compat import unwrapped
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of

# Copies of a latent's frames at the decoder's full width that are alive at its peak: 12.7 in Wan 2.1's at 480×832, float32.
MOST_COPIES = 20


@dataclasses.dataclass(frozen=True)
class StreamMemory:
    """Bytes on one device. free: what it can still give. weights: still to be loaded. decode: 0 where another device decodes.
    latent: of a latent frame of the window, in ``cache``. window: latent frames; least: that a window must have. more: what else
    takes less. notes: what is not counted."""

    device: str
    free: int
    weights: int
    cache: int
    forward: int
    decode: int
    latent: int
    window: int
    least: int
    more: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        at_work = max if self.device == "cpu" else lambda *both: sum(both)
        return self.weights + self.cache + at_work(self.forward, self.decode)

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def check(self) -> None:
        """Refuse a stream that has no room.

        Raises:
            ConfigError: with the numbers, and what to lower.
        """
        if self.fits:
            return
        if not self.latent:  # windows without a cache
            raise ConfigError(
                f"the stream does not fit: {self}. Give a smaller window (it has {self.window} latent frames), a smaller height "
                "and width" + "".join(f", or {one}" for one in self.more)
            )
        room = self.window - -(-(self.needed - self.free) // self.latent)
        fit = f"{room} have room" if room >= self.least else f"even the fewest, {self.least}, have no room"
        raise ConfigError(
            f"the stream does not fit: {self}. Give a smaller window (a latent frame takes {amount(self.latent)}; it has "
            f"{self.window} now, {fit}), a smaller height and width" + "".join(f", or {one}" for one in self.more)
        )

    def __str__(self) -> str:
        kept = "KV cache" if self.latent else "keys of earlier windows"
        parts = {"weights": self.weights, kept: self.cache, "forward": self.forward, "decoding": self.decode}
        told = ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if size)
        return f"{amount(self.needed)} needed on {self.device} ({told}), {amount(self.free)} free"

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "more": list(self.more),
            "notes": list(self.notes),
            "needed": self.needed,
            "fits": self.fits,
        }


def plan_stream(
    pipe: Any,
    space: LatentSpace,
    *,
    cache: int,
    latent: int,
    between: int,
    tokens: int,
    chunk: int,
    window: int,
    sink: int,
    size: tuple[int, int],
    device: torch.device,
    decode_device: torch.device | None = None,
    own_vae: bool = True,
    more: tuple[str, ...] = (),
    exact: bool = True,
) -> StreamMemory:
    """What a stream takes on the device of its denoisers.

    Args:
        pipe: loaded, or a skeleton, whose weights are counted. space: of its latents.
        cache, latent: bytes of the KV caches, and of a latent frame in them. between: bytes that are copied between two chunks.
        tokens: of a chunk. chunk, window, sink: latent frames. size: height and width in pixels.
        decode_device: where the VAE decodes; None: there too. own_vae: False: a tiny autoencoder decodes, which is not counted.
        more: what else takes less, for the error.
        exact: False: where there is room for more than a decode can take, that much is said instead of a count, which takes
            seconds.
    """
    denoiser: Any = next(iter(denoisers_of(pipe).values()))
    parts, notes = weight_bytes(pipe, denoiser.dtype) if denoiser.device.type == "meta" else ([], [])
    to_load = sum(parts)
    forward = max(forward_bytes(pipe, tokens, denoiser.dtype), between)
    plan = StreamMemory(
        str(device), free_bytes(device), to_load, cache, forward, 0, latent, window, chunk + sink, more, tuple(notes)
    )
    if not own_vae:
        return dataclasses.replace(plan, notes=(*plan.notes, "the tiny autoencoder is not counted"))
    if decode_device is not None and decode_device != device:
        return plan
    most = None if exact else _most_of_a_decode(pipe, space, size)
    if most is not None and (rough := dataclasses.replace(plan, decode=most)).fits:
        return rough
    return dataclasses.replace(plan, decode=_of_a_decode(pipe, space, chunk, size))


def _of_a_decode(pipe: Any, space: LatentSpace, chunk: int, size: tuple[int, int]) -> int:
    vae: Any = unwrapped(pipe.vae)
    spatial, temporal = space.factors(pipe)
    config = json.dumps(dict(vae.config), sort_keys=True, default=str)
    shape = min(2, chunk), *(side // spatial for side in size)
    more = 2 * 3 * max(0, chunk - 2) * temporal * size[0] * size[1] * vae.dtype.itemsize  # twice, while they are joined
    kind: Any = type(vae)
    return decode_peak(space, kind, config, vae.dtype, *shape) + more


def _most_of_a_decode(pipe: Any, space: LatentSpace, size: tuple[int, int]) -> int | None:
    """More than a decode of Wan's VAE takes; None for another VAE."""
    vae: Any = unwrapped(pipe.vae)
    width = vae.config.get("decoder_base_dim") or vae.config.get("base_dim")
    if width is None:
        return None
    most: int = MOST_COPIES * width * space.factors(pipe)[1] * size[0] * size[1] * vae.dtype.itemsize
    return most
