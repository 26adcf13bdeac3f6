"""Windows of a stock, bidirectional pipeline, end to end: random weights, frames in host memory, at the clock of who reads.

LTX-Video of 0.9.8's shape, distilled to 8 steps without guidance, by the way ``prefix``: 161 frames a window, of which 24 are
those of the window before. Without the text encoder. Each new window has 144 frames, six seconds at 24 a second.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tilewise
from benchmarks.peers import reason

STOCK, DENSE, SPARSE = "stock blocks", "tilewise, dense", "tilewise, STA density 0.3"
FPS = 24.0
STEPS = 8
LTX_2B: dict[str, Any] = {}  # the class's own defaults
LTX_13B = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
# The decoder from 0.9.5 on. The encoder has no part in this.
VAE = {
    "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 5, 5, 5),
    "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (False,) * 4, "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2), "timestep_conditioning": True,
}  # fmt: skip
TINY_LTX = {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "in_channels": 8,
    "out_channels": 8, "caption_channels": 16,
}  # fmt: skip
TINY_VAE = {
    "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8, 16, 32), "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
}  # fmt: skip


@dataclass(frozen=True)
class WindowWork:
    """A transformer's and a decoder's config, pixels (height, width), and latent frames of a window and its overlap.

    windows: so many of each variant, after the first. variants: names, and how many windows of those that have fewer.
    """

    model: str
    config: dict[str, Any]
    vae: dict[str, Any]
    size: tuple[int, int]
    window: int
    overlap: int
    windows: int
    variants: tuple[tuple[str, int | None], ...] = ((STOCK, 4), (DENSE, 4), (SPARSE, None))

    @property
    def name(self) -> str:
        height, width = self.size
        frames, overlap = 1 + 8 * (self.window - 1), 8 * self.overlap
        return f"{self.model} {height}×{width}, windows of {frames} frames, overlap {overlap}, end to end"


WORKS = [
    WindowWork("LTX-Video 2B", LTX_2B, VAE, (704, 1216), 21, 3, 20),
    WindowWork("LTX-Video 13B", LTX_13B, VAE, (704, 1216), 21, 3, 6),
]
TINY = [WindowWork("tiny LTX", TINY_LTX, {**VAE, **TINY_VAE}, (64, 64), 4, 1, 3, ((STOCK, 2), (SPARSE, None)))]


def run(device: torch.device, works: list[WindowWork]) -> Iterator[dict[str, Any]]:
    """One row a work; milliseconds are of a window. "grown_bytes": what is allocated more after the last window than after the
    first but one; "peak_gib": the most at any time."""
    for work in works:
        pipe = None
        gc.collect()
        row = {"name": work.name, "model": work.model, "window": work.window, "overlap": work.overlap, "steps": STEPS}
        variants: list[dict[str, Any]] = []
        missing: dict[str, str] = {}
        try:
            pipe = _pipeline(work, device)
        except Exception as error:
            yield {**row, "variants": [], "missing": {name: reason(error) for name, _ in work.variants}}
            continue
        for name, count in work.variants:
            try:
                variants.append({"name": name, **_measured(work, pipe, name, count or work.windows, device)})
            except Exception as error:
                missing[name] = reason(error)
        yield {**row, "variants": variants, "missing": missing}


def _measured(work: WindowWork, pipe: Any, name: str, windows: int, device: torch.device) -> dict[str, Any]:
    height, width = work.size
    method: Any = tilewise.STA(density=0.3) if name == SPARSE else "dense"
    times, frames, allocated = [], 0, [0]
    with (
        tilewise.patched(pipe, method, steps=(0.0, 1.0), fuse=name != STOCK, **_whole(work, name)),
        tilewise.stream(
            pipe, "random", way="prefix", window=work.window, overlap=work.overlap, steps=STEPS, guidance=1.0, fps=FPS,
            height=height, width=width,
        ) as video,
    ):  # fmt: skip
        before = time.perf_counter()
        next(video)
        first = time.perf_counter() - before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(windows):
            before = time.perf_counter()
            frames += len(next(video).frames)
            times.append(time.perf_counter() - before)
            allocated.append(torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
        report = tilewise.summary(pipe)
    ordered = sorted(times)
    peak = {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}
    return {
        "ms": 1e3 * statistics.median(times), "ms_min": 1e3 * ordered[0], "ms_max": 1e3 * ordered[-1], "runs": len(times),
        "ms_p95": 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))], "fps": frames / sum(times), "frames": frames,
        "density": report.density, "first_ms": 1e3 * first, "grown_bytes": allocated[-1] - allocated[1],
        "fallbacks": sorted(report.fallbacks), **peak,
    }  # fmt: skip


def _whole(work: WindowWork, name: str) -> dict[str, Any]:
    """The tiny size is shorter than what runs sparse by default."""
    return {"min_tokens": 0} if name == SPARSE and work in TINY else {}


def _pipeline(work: WindowWork, device: torch.device) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    with device:
        transformer: Any = LTXVideoTransformer3DModel(**work.config).to(torch.bfloat16).eval()
        vae: Any = AutoencoderKLLTXVideo(**work.vae).to(torch.bfloat16).eval()
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)  # type: ignore[arg-type]
    for part in (transformer, vae):
        part.requires_grad_(False)
    text = torch.randn(1, 128, transformer.config.caption_channels, device=device).to(torch.bfloat16)
    mask = torch.ones(1, 128, dtype=torch.int64, device=device)
    untyped: Any = pipe
    untyped.encode_prompt = lambda **_: (text, mask, text, mask)
    return pipe
