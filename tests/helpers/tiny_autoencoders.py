"""Tiny video autoencoders: random weights under the published names, a plain decode of them, and a pipeline that they fit."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tiny_wan import tiny_pipeline, tiny_vae
from torch.nn import functional as F


def published_weights(
    seed: int = 0,
    *,
    channels: int = 4,
    widths: tuple[int, int, int, int] = (6, 5, 4, 3),
    growth: tuple[int, int, int] = (1, 2, 2),
    patch: int = 1,
    wide: bool = False,
    encoder: bool = True,
) -> dict[str, torch.Tensor]:
    """Weights as in taew2_1 (or with ``wide``, of the "super" variant), float16, by name."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}

    def conv(name: str, out: int, of: int, side: int = 3, bias: bool = True) -> None:
        fan = of * side * side
        weights[f"{name}.weight"] = torch.randn(out, of, side, side, generator=generator).div(fan**0.5).half()
        if bias:
            weights[f"{name}.bias"] = torch.randn(out, generator=generator).mul(0.1).half()

    conv("decoder.0" if wide else "decoder.1", widths[0], channels, 1 if wide else 3, not wide)
    for stage, (width, after) in enumerate(itertools.pairwise(widths)):
        first = (1 + 7 * stage) if wide else (3 + 6 * stage)
        for block in range(first, first + 3):
            if wide:
                conv(f"decoder.{block}.conv.0", 2 * width, 1, 7, bias=False)
                conv(f"decoder.{block}.conv.1", 4 * width, 2 * width, 1)
                conv(f"decoder.{block}.conv.3", width, 4 * width, 1, bias=False)
            else:
                conv(f"decoder.{block}.conv.0", width, 2 * width)
                conv(f"decoder.{block}.conv.2", width, width)
                conv(f"decoder.{block}.conv.4", width, width)
        if wide:
            conv(f"decoder.{first + 3}", 4 * after, width)
            conv(f"decoder.{first + 6}.conv", growth[stage] * after, after, 1, bias=False)
        else:
            conv(f"decoder.{first + 4}.conv", growth[stage] * width, width, 1, bias=False)
            conv(f"decoder.{first + 5}", after, width, bias=False)
    conv("decoder.22", 3 * patch * patch, widths[3])
    weights["decoder.22.bias"] += 0.5  # colours, not all of them clamped
    if encoder:
        conv("encoder.0", 4, 3 * patch * patch)
    return weights


def plain_decode(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """(B, C, T, h, w) to (B, 3, F, H, W) in −1 … 1, by the published modules in their order: a whole clip, frame after frame."""
    weights = {name: weight.to(latents.dtype) for name, weight in weights.items()}
    wide = "decoder.0.weight" in weights
    frames = list(latents.unbind(2))

    def conv(x: torch.Tensor, name: str, groups: int = 1) -> torch.Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2, groups=groups)

    def block(x: torch.Tensor, past: torch.Tensor, at: int) -> torch.Tensor:
        both = torch.cat([x, past], 1)
        if wide:
            inner = F.relu(conv(conv(both, f"{at}.conv.0", both.shape[1]), f"{at}.conv.1"))
            return conv(inner, f"{at}.conv.3") + x
        inner = F.relu(conv(F.relu(conv(both, f"{at}.conv.0")), f"{at}.conv.2"))
        return F.relu(conv(inner, f"{at}.conv.4") + x)

    def grown(x: torch.Tensor, at: int) -> list[torch.Tensor]:
        out = conv(x, f"{at}.conv")
        return list(out.chunk(out.shape[1] // x.shape[1], 1))

    frames = [conv(x, "0") if wide else F.relu(conv(torch.tanh(x / 3) * 3, "1")) for x in frames]
    for stage in range(3):
        first = (1 + 7 * stage) if wide else (3 + 6 * stage)
        for at in range(first, first + 3):
            frames = [block(x, frames[i - 1] if i else x * 0, at) for i, x in enumerate(frames)]
        if wide:
            frames = [F.pixel_shuffle(F.relu(conv(x, f"{first + 3}")), 2) for x in frames]
            frames = [one for x in frames for one in grown(x, first + 6)]
        else:
            frames = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames]
            frames = [conv(one, f"{first + 5}") for x in frames for one in grown(x, first + 4)]
    frames = [conv(x if wide else F.relu(x), "22") for x in frames]
    patch = round((frames[0].shape[1] / 3) ** 0.5)
    video = torch.stack([F.pixel_shuffle(x, patch) for x in frames], 2)
    return video[:, :, len(frames) // latents.shape[2] - 1 :].clamp(0, 1) * 2 - 1


def fitting_pipeline(**kwargs: Any) -> Any:
    """A tiny Wan pipeline with 8 pixels and 4 frames a latent, whose latents are not normalised by 0 and 1."""
    pipe = tiny_pipeline(**kwargs)
    vae = tiny_vae(
        dim_mult=[1, 1, 1], temperal_downsample=[True, True], scale_factor_temporal=4, scale_factor_spatial=8,
        latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.2],
    )  # fmt: skip
    return type(pipe)(**{**pipe.components, "vae": vae})
