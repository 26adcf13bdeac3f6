"""A stream in its steady state: one forward of a chunk against a full KV cache, and whole chunks with the VAE. Random weights.

Forwards: stock blocks and attention of PyTorch's own choice over the same cache, against the fused blocks, a captured CUDA graph,
and sparse attention in the window. End to end: four denoising passes and one that writes the cache, decoded to frames in host
memory, at the clock of who reads them.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tilewise
from benchmarks.peers import reason
from benchmarks.step import CONFIGS, build
from benchmarks.timing import measure
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.latent_spaces.wan import SPACE
from tilewise.pipelines.streaming.decoding import FrameDecoder
from tilewise.pipelines.streaming.prompts import Prompts
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.pipelines.streaming.video_stream import VideoStream
from tilewise.plugins.autoencoders.streaming import streaming_decoder
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser

STOCK = "stock blocks"


@dataclass(frozen=True)
class Work:
    """A model, pixels by name, latents (height, width), latent frames of a chunk, and of window and sink."""

    model: str
    pixels: str
    latents: tuple[int, int]
    window: int
    sink: int = 3
    chunk: int = 3
    decoded: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.pixels}, window {self.window}{', end to end' if self.decoded else ''}"


WORKS = [
    Work("Wan2.1-1.3B", "480×832", (60, 104), 12),
    Work("Wan2.1-1.3B", "480×832", (60, 104), 21),
    Work("Wan2.1-14B, 10 layers", "480×832", (60, 104), 12),
    Work("Wan2.1-1.3B", "480×832", (60, 104), 12, decoded=True),
]
TINY = [Work("tiny", "16×16", (2, 2), 4, 2, 2), Work("tiny", "16×16", (2, 2), 4, 2, 2, decoded=True)]

Variant = tuple[Any, bool, bool]  # method, fused blocks, CUDA graph
VARIANTS: dict[str, Variant] = {
    STOCK: ("dense", False, False),
    "tilewise, dense": ("dense", True, False),
    "tilewise, dense, CUDA graph": ("dense", True, True),
    "tilewise, STA density 0.3, CUDA graph": (tilewise.STA(density=0.3), True, True),
    "tilewise, draft density 0.3, CUDA graph": (tilewise.Draft(density=0.3, min_tokens=0), True, True),
}
PASSES = 4


def run(device: torch.device, seconds: float, works: list[Work]) -> Iterator[dict[str, Any]]:
    """One row a work."""
    model, built = None, ""
    for work in works:
        if work.model != built:
            model = None
            gc.collect()
            model, built = build(CONFIGS[work.model], device, torch.bfloat16), work.model
        row = {"name": work.name, "model": work.model, "window": work.window, "sink": work.sink, "chunk": work.chunk}
        yield {**row, **(_end_to_end if work.decoded else _forwards)(work, model, device, seconds)}


def _forwards(work: Work, model: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of one forward by variant, and each variant's difference from stock blocks."""
    variants: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    stock = None
    for name, variant in VARIANTS.items():
        try:
            with _causal(work, model, variant) as causal:
                inputs = _inputs(work, model, device)
                for _ in range(2 * work.window // work.chunk):  # to a full window, and every turn of its ring
                    causal.begin()
                    for _ in range(3):
                        causal(*inputs)
                    causal.commit()
                causal.begin()
                out = causal(*inputs)
                timing = measure(lambda: causal(*inputs), device, seconds=seconds, flush=False)  # noqa: B023
                refused = causal.graphs.refused
                report = tilewise.summary(model)
        except Exception as error:
            missing[name] = reason(error)
            continue
        stock = out if stock is None else stock
        error = float((out - stock).norm() / stock.norm())
        fallbacks = sorted(report.fallbacks)
        told = {"graph_refused": refused} if refused else {}
        density = report.density
        variants.append(
            {"name": name, **timing.to_dict(), "error": error, "density": density, "fallbacks": fallbacks, **told}
        )
    return {"variants": variants, "missing": missing}


def _end_to_end(work: Work, model: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Frames a second of whole chunks by variant; milliseconds are of a chunk."""
    variants: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    vae = _vae(work, device)
    for name, variant in VARIANTS.items():
        if name not in (STOCK, "tilewise, dense, CUDA graph", "tilewise, STA density 0.3, CUDA graph"):
            continue
        try:
            with _causal(work, model, variant) as causal, _video(work, model, vae, causal, device) as video:
                for _ in range(2 * work.window // work.chunk):
                    next(video)
                times, frames, begin = [], 0, time.perf_counter()
                while len(times) < 3 or time.perf_counter() - begin < 4 * seconds:
                    before = time.perf_counter()
                    frames += len(next(video).frames)
                    times.append(time.perf_counter() - before)
            with _causal(work, model, variant) as causal, _video(work, model, vae, causal, device) as video:
                before = time.perf_counter()
                next(video)
                first = time.perf_counter() - before
        except Exception as error:
            missing[name] = reason(error)
            continue
        ordered = sorted(times)
        chunk = {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * ordered[0], "ms_max": 1e3 * ordered[-1]}
        p95 = 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        variants.append(
            {
                "name": name,
                **chunk,
                "runs": len(times),
                "ms_p95": p95,
                "fps": frames / sum(times),
                "first_ms": 1e3 * first,
            }
        )
    return {"variants": variants, "missing": missing}


@contextlib.contextmanager
def _causal(work: Work, model: Any, variant: Variant) -> Iterator[CausalDenoiser]:
    method, fuse, graph = variant
    cache = tilewise.KVCache(window=work.window, sink=work.sink)
    grid = Grid(work.chunk, work.latents[0] // 2, work.latents[1] // 2)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(tilewise.patched(model, method, steps=(0.0, 1.0), fuse=fuse))
        yield stack.enter_context(CausalDenoiser(model, cache, grid=grid, cuda_graph=graph))


def _inputs(work: Work, model: Any, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(1, 16, work.chunk, *work.latents, generator=generator, device=device)
    return latents.to(torch.bfloat16), torch.tensor([500.0], device=device), _text(model, device)


def _text(model: Any, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(1, 512, model.config.text_dim, generator=generator, device=device).to(torch.bfloat16)


def _vae(work: Work, device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if work.model == "tiny" else {}
    with device:
        return AutoencoderKLWan(**small).to(torch.bfloat16).eval().requires_grad_(False)  # type: ignore[arg-type]


def _video(work: Work, model: Any, vae: Any, causal: CausalDenoiser, device: torch.device) -> VideoStream:
    """A stream over these parts, without a text encoder."""
    recipe = CausalRecipe(chunk=work.chunk, window=work.window, sink=work.sink)
    states = TextStates(_text(model, device))
    sampler = CausalSampler(
        [causal], recipe, states, shape=(16, *work.latents), generator=torch.Generator(device).manual_seed(0), device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    decoder = FrameDecoder(streaming_decoder(vae), SPACE, vae, device)
    prompts = Prompts(lambda prompt: states.positive, "random", states)
    return VideoStream(
        sampler, decoder, prompts, recipe, window=work.window, chunk=work.chunk, frames=None, fps=16.0, temporal=4,
        close=lambda: None, ahead=int(device.type == "cuda"),
    )  # fmt: skip
