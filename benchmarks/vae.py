"""Wan's VAE in the middle of a clip: 12 frames decoded, and 12 encoded, with a full feature cache. Random weights, bfloat16.

Stock code against the same code with channels-last weights, and the fused forward. Each is compared with the stock code in
float32; memory is what PyTorch allocated at most, weights and cache included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import reason
from benchmarks.timing import measure
from tilewise.plugins.autoencoders.streaming import streaming_decoder, streaming_encoder

LATENTS = 3  # a chunk: 12 frames
OURS = "tilewise"


@dataclass(frozen=True)
class Work:
    """Pixels (height, width); options of the VAE config, none for Wan 2.1 itself."""

    pixels: tuple[int, int]
    encode: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        what = "encode" if self.encode else "decode"
        return f"{'tiny' if self.options else 'Wan 2.1'} VAE, {what} 12 frames {self.pixels[0]}×{self.pixels[1]}"


WORKS = [Work((480, 832)), Work((720, 1280)), Work((480, 832), encode=True)]
SMALL = (("base_dim", 8), ("dim_mult", [1, 1, 1, 1]), ("num_res_blocks", 1))
TINY = [Work((32, 48), options=SMALL), Work((32, 48), encode=True, options=SMALL)]


def _vae(work: Work, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**dict(work.options))
    return vae.to(device, dtype).eval().requires_grad_(False)


def _channels_last(vae: Any) -> Any:
    vae = copy.deepcopy(vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def _chunks(work: Work, vae: Any, fuse: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns the next chunk of one clip into frames, or frames into latents."""
    return streaming_encoder(vae, fuse=fuse).encode if work.encode else streaming_decoder(vae, fuse=fuse).decode


def _inputs(work: Work, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the clip begins with, and a chunk of what goes on."""
    generator = torch.Generator(device).manual_seed(1)
    height, width = work.pixels
    if work.encode:
        first, chunk = (1, 3, 5, height, width), (1, 3, 4 * LATENTS, height, width)
    else:
        first, chunk = (1, 16, 2, height // 8, width // 8), (1, 16, LATENTS, height // 8, width // 8)
    return tuple(torch.randn(shape, generator=generator, device=device) for shape in (first, chunk))  # type: ignore[return-value]


@torch.no_grad()
def run(device: torch.device, seconds: float, works: list[Work]) -> Iterator[dict[str, Any]]:
    """One row a work."""
    dtype = torch.bfloat16
    for work in works:
        first, chunk = _inputs(work, device)
        reference = _vae(work, device, torch.float32)
        exact = _chunks(work, reference, False)
        exact(first)
        want = exact(chunk)
        del reference, exact
        first, chunk = first.to(dtype), chunk.to(dtype)
        row: dict[str, Any] = {"name": work.name, "dtype": "bfloat16", "variants": [], "missing": {}, "wrong": []}
        vae = _vae(work, device, dtype)
        for name, fuse in (("stock", False), ("stock, channels-last weights", False), (OURS, True)):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                step = _chunks(work, _channels_last(vae) if "channels-last" in name else vae, fuse)
                step(first)
                error = float((step(chunk).float() - want).norm() / want.norm())
                timing = measure(lambda: step(chunk), device, seconds=seconds, flush=False)  # noqa: B023
            except Exception as error_:  # kept, by name
                row["missing"][name] = reason(error_)
                continue
            facts: dict[str, Any] = {"error": error, "fps": 4 * LATENTS / timing.median * 1e3}
            if device.type == "cuda":
                facts["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            if error > 1.1 * (row["variants"] or [facts])[0]["error"]:
                row["wrong"].append(name)
            row["variants"].append({"name": name, **timing.to_dict(), **facts})
        yield row
