"""The stock Wan autoencoder, run over a whole clip at once: the form in which it can be trained.

Stock `encode` and `decode` walk through a clip in chunks and carry the convolutions' history in a cache, which is slow and
awkward to differentiate. Calling the modules without that cache is not the answer either: the resampling layers then
skip their convolutions over time, without a word. `WholeClipVae` computes what the chunk loop computes, in one pass.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan

from .config import Config


def build_vae(config: Config) -> AutoencoderKLWan:
    """A small stock Wan VAE: 4× in space (2× by patchifying), 2× in time."""
    z = config.vae.z_dim
    return AutoencoderKLWan(
        base_dim=config.vae.base_dim,
        z_dim=z,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


class WholeClipVae(torch.nn.Module):
    """Shares its weights with `vae`, whose resampling layers it re-routes; `close` undoes that."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, wan.WanResample):
                module.forward = _Resample(module)  # an instance attribute: other autoencoders are not touched

    def close(self) -> AutoencoderKLWan:
        """The VAE with its stock behaviour."""
        for module in self.vae.modules():
            if isinstance(module, wan.WanResample):
                module.__dict__.pop("forward", None)
        return self.vae

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latents."""
        patches = wan.patchify(video, patch_size=self.vae.config.patch_size)
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(patches)).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels before clamping: stock `decode` clamps, which would cut gradients off."""
        patches = self.vae.decoder(self.vae.post_quant_conv(latents))
        return wan.unpatchify(patches, patch_size=self.vae.config.patch_size)


class _Resample:
    """`WanResample.forward` for a whole clip: the first frame has a latent of its own, the others go in pairs."""

    def __init__(self, module: wan.WanResample) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, feat_cache: object = None, feat_idx: object = None) -> torch.Tensor:
        module = self.module
        if module.mode == "upsample3d" and x.shape[2] > 1:
            batch, channels, frames, height, width = x.shape
            pairs = module.time_conv(x[:, :, 1:]).reshape(batch, 2, channels, frames - 1, height, width)
            pairs = pairs.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * (frames - 1), height, width)
            x = torch.cat([x[:, :, :1], pairs], 2)
        batch, _, frames = x.shape[:3]
        x = module.resample(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        x = x.unflatten(0, (batch, frames)).permute(0, 2, 1, 3, 4)
        if module.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], module.time_conv(x)], 2)
        return x


def use_channels_last(module: torch.nn.Module) -> None:
    """Convolutions on a GPU are faster in this layout."""
    for child in module.modules():
        if isinstance(child, torch.nn.Conv3d):
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(child, torch.nn.Conv2d):
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, video: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Reconstruction quality of each clip in dB, by stock chunked encode and decode."""
    values = []
    for part in video.split(batch):
        error = (vae.decode(vae.encode(part).latent_dist.mode()).sample - part) / 2
        values.append(-10 * torch.log10(error.square().mean((1, 2, 3, 4)) + 1e-10))
    return torch.cat(values)
