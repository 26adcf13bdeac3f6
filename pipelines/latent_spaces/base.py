"""Convert a pipeline's latents to frames and back, and to the shape that its call takes. The second stage needs both.

    frames (T, H, W, 3) in 0 … 1  ⇄  latents (1, C, t, h, w), z = (x − mean) / std  ⇄  packed: what the call takes and gives

A new kind of pipeline is a new file in this folder. Images are clips of one frame.

Tiles of a VAE overlap by a quarter and are blended: close to the whole decode and not equal to it, as the middle block of these
VAEs attends over, or normalises by, the whole picture.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

import tilewise.pipelines.latent_spaces
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import UnsupportedModelError
from tilewise.plugins.models.common.native_size import call_parameters

NO_LATENTS = "it needs latents that it can encode and enter the schedule with"
NO_SIZE = "its call takes no size, and a larger one cannot be asked for"

Statistics = tuple[torch.Tensor | float, torch.Tensor | float]


class LatentSpace:
    """One kind of pipeline. Stateless: one instance serves all.

    Attributes:
        pipelines: class names.
        one_batch: guidance runs both texts in one forward.
        distilled: guidance is a number that the denoiser takes: one forward a step, of the prompt alone.
        still: the pipeline makes an image.
        left_out: what else the pipeline makes, which a stream of windows leaves out; "": nothing.
        flat: its VAE takes (B, C, H, W).
        encoder_run: the encoder takes frames in runs of so many after the first, and drops what is over; 1: as they come.
        mixes: the pipeline puts the pictures that it is given among the latents that it begins with, and would not do so with
            latents of somebody else's: ``begun`` does.
        unserved: roles of files (``conditioning.files.ROLES``) that the second stage cannot have, with the reason.
    """

    pipelines: ClassVar[tuple[str, ...]]
    one_batch: ClassVar[bool] = False
    distilled: ClassVar[bool] = False
    still: ClassVar[bool] = False
    flat: ClassVar[bool] = False
    encoder_run: ClassVar[int] = 1
    mixes: ClassVar[bool] = False
    unserved: ClassVar[Mapping[str, str]] = {}
    left_out: ClassVar[str] = ""

    def factors(self, pipe: Any) -> tuple[int, int]:
        """Pixels to a latent: (along height and width, in time)."""
        return (
            (pipe.vae_scale_factor, 1)
            if self.still
            else (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal)
        )

    def channels(self, vae: Any) -> int:
        return vae.config.latent_channels

    def statistics(self, vae: Any, like: torch.Tensor) -> Statistics:
        """(mean, std) of the VAE's latents, broadcast over (1, C, t, h, w)."""
        return vae.config.get("shift_factor") or 0.0, 1 / vae.config.scaling_factor

    def refuses(self, pipe: Any) -> str | None:
        """Why a pipeline of this kind cannot be served as it is, or None."""
        return None

    def alike(self, pipe: Any, size: tuple[int, int], own: tuple[int, int]) -> bool:
        """Whether the pipeline treats a (height, width) as it does the model's own."""
        return True

    def mu(self, config: Any, tokens: int, asked: dict[str, Any]) -> float:
        """What the pipeline asks a scheduler with ``use_dynamic_shifting`` for at a size of so many tokens; asked: its arguments
        at the first stage's size."""
        return interpolated_mu(config, tokens, asked)

    def packed(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """(1, C, t, h, w) as the pipeline's call takes ``latents``."""
        return latents[:, :, 0] if self.flat else latents

    def unpacked(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """What the call gave, as (1, C, t, h, w); shape: (t, h, w)."""
        return latents[:, :, None] if self.flat else latents

    def begun(self, pipe: Any, prepare: Callable[..., Any], latents: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """What ``prepare``, the pipeline's ``prepare_latents``, gives with its own arguments, with ``latents`` for its noise.

        Only where ``mixes``. latents: (1, C, t, h, w), noised.
        """
        raise NotImplementedError

    def finished(self, pipe: Any, out: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """What the call returned with output_type="latent", as normalised (1, C, t, h, w)."""
        return self.unpacked(pipe, out, shape)

    def decode_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """(1, C, t, h, w) of the VAE's own scale to pixels (1, 3, T, H, W) in −1 … 1."""
        if self.flat:
            return vae.decode(latents[:, :, 0], return_dict=False)[0][:, :, None]
        return vae.decode(latents, return_dict=False)[0]

    def encode_vae(self, vae: Any, video: torch.Tensor) -> torch.Tensor:
        """Pixels (1, 3, T, H, W) in −1 … 1 to latents (1, C, t, h, w) of the VAE's own scale, float32: the mean, not a sample.

        Raises UnsupportedModelError for a VAE that gives no distribution, as diffusers' tiny ones do.
        """
        encoded = vae.encode(video[:, :, 0] if self.flat else video)
        if not hasattr(encoded, "latent_dist"):
            raise UnsupportedModelError(
                f"highres needs the model's own VAE: a {type(vae).__name__} encodes to no distribution"
            )
        latents = encoded.latent_dist.mode().float()
        return latents[:, :, None] if self.flat else latents

    def shape(self, pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """(t, h, w) of the latents of a clip."""
        spatial, temporal = self.factors(pipe)
        return (frames - 1) // temporal + 1, height // spatial, width // spatial

    @torch.no_grad()
    def encode(self, pipe: Any, frames: NDArray[np.float32]) -> torch.Tensor:
        """(T, H, W, 3) in 0 … 1 to normalised latents (1, C, t, h, w), float32 on the VAE's device: the mean, not a sample.

        A clip whose length the encoder would cut is lengthened with its last frame, and the latents are cut: exact, as these
        encoders are causal in time, and what comes later changes nothing before.
        """
        vae, count = pipe.vae, len(frames)
        missing = -(count - 1) % self.encoder_run
        if missing:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])
        device = execution_device(pipe, vae.device)
        video = torch.from_numpy(np.ascontiguousarray(frames)).to(device, vae.dtype).permute(3, 0, 1, 2)[None] * 2 - 1
        latents = self.encode_vae(vae, video)
        pipe.maybe_free_model_hooks()  # an offloaded VAE makes room for the denoiser
        mean, std = self.statistics(vae, latents)
        return ((latents - mean) / std)[:, :, : self.shape(pipe, frames.shape[1], frames.shape[2], count)[0]]

    @torch.no_grad()
    def decode(self, pipe: Any, latents: torch.Tensor) -> NDArray[np.float32]:
        """Normalised latents (1, C, t, h, w) to frames (T, H, W, 3) in 0 … 1: what the pipeline does at its end."""
        vae = pipe.vae
        latents = latents.to(execution_device(pipe, vae.device), vae.dtype)
        mean, std = self.statistics(vae, latents)
        video = self.decode_vae(vae, latents * std + mean)
        frames: NDArray[np.float32]
        if self.still:
            frames = pipe.image_processor.postprocess(video[:, :, 0], output_type="np")
        else:
            frames = pipe.video_processor.postprocess_video(video, output_type="np")[0]
        pipe.maybe_free_model_hooks()
        return frames


def by_channel(config: Any, like: torch.Tensor) -> Statistics:
    """The mean and std that a VAE's config lists for each channel."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return mean.to(like), std.to(like)


def interpolated_mu(config: Any, tokens: int, asked: dict[str, Any]) -> float:
    """μ of ``use_dynamic_shifting`` for a picture or clip of so many tokens, as most pipelines have it, of a scheduler's config:

    μ = base_shift + (max_shift − base_shift) · share of the way from base_image_seq_len to max_image_seq_len,
    flow shift m = exp(μ)     (arXiv 2403.03206, §5.3.2)
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return least + (most - least) * (tokens - low) / (high - low)


@cache
def latent_spaces() -> dict[str, LatentSpace]:
    """Pipeline class name → its latent space."""
    found: dict[str, LatentSpace] = {}
    for module in pkgutil.iter_modules(tilewise.pipelines.latent_spaces.__path__):
        if module.name != "base":
            space = importlib.import_module(f"tilewise.pipelines.latent_spaces.{module.name}").SPACE
            found.update(dict.fromkeys(space.pipelines, space))
    return found


def latent_space(pipe: Any) -> LatentSpace:
    """The latent space of a pipeline.

    Raises:
        UnsupportedModelError: for a kind of pipeline that none is known of, or a model of it that cannot be served.
    """
    spaces, kind = latent_spaces(), type(pipe).__name__
    if kind not in spaces:
        unsized = "height" not in call_parameters(pipe)
        raise UnsupportedModelError(
            f"highres serves {', '.join(sorted(spaces))}, not {kind}: {NO_SIZE if unsized else NO_LATENTS}. "
            "tilewise.patch(pipe, 'inward') gives the window alone, and tilewise.patch(pipe, 'hidiffusion') makes larger "
            "pictures with the UNet of SD 1.5, SD 2.1 or SDXL"
        )
    space = spaces[kind]
    if (why := space.refuses(pipe)) is not None:
        raise UnsupportedModelError(f"highres does not serve this {kind}: {why}")
    return space


@contextmanager
def tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Run a block with the VAE in tiles, or as its user has it, and put its switch back."""
    before = vae.use_tiling
    vae.use_tiling = wanted or before
    try:
        yield
    finally:
        vae.use_tiling = before
