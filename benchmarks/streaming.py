"""A stream in its steady state: one forward of a chunk against a full KV cache, and whole chunks with the VAE. Random weights.

Forwards: stock blocks and attention of PyTorch's own choice over the same cache, against the fused blocks, a captured CUDA graph,
sparse attention in the window, and a cache in 8 bits. End to end: four denoising passes and one that writes the cache, decoded to
frames in host memory, at the clock of who reads them; by a tiny autoencoder too, with the VAE on a second GPU, with linear layers
in fp8 (torchao), and for ten minutes of video. After a change of the prompt: how long until its first frames, without the text
encoder.
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
from benchmarks.layers import fp8_linears
from benchmarks.peers import reason
from benchmarks.step import CONFIGS, build
from benchmarks.timing import measure
from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.latent_spaces.wan import SPACE
from tilewise.pipelines.streaming.causal_source import CausalSource
from tilewise.pipelines.streaming.decoding import FrameDecoder
from tilewise.pipelines.streaming.prompts import Prompts
from tilewise.pipelines.streaming.recipe import CausalRecipe
from tilewise.pipelines.streaming.sampler import CausalSampler, TextStates
from tilewise.pipelines.streaming.video_stream import VideoStream
from tilewise.plugins.autoencoders.streaming import streaming_decoder
from tilewise.plugins.autoencoders.tiny import TinyDecoder, TinyShape
from tilewise.plugins.autoencoders.tiny_streaming import TinyStreamingDecoder
from tilewise.plugins.streaming.causal_denoiser import CausalDenoiser

STOCK = "stock blocks"
DENSE, SPARSE = "tilewise, dense, CUDA graph", "tilewise, STA density 0.3, CUDA graph"
HALF = "tilewise, STA density 0.5, CUDA graph"
DRAFT = "tilewise, draft density 0.3, CUDA graph"
FP8_CACHE = "tilewise, dense, fp8 cache, CUDA graph"
TINY_DECODER = f"{SPARSE}, tiny autoencoder"


@dataclass(frozen=True)
class Variant:
    """A method, whether blocks are fused and forwards captured, the storage of the cache, and what decodes."""

    method: Any
    fuse: bool = True
    graph: bool = True
    storage: str = "model"
    tiny: bool = False


STA = tilewise.STA(density=0.3)
VARIANTS = {
    STOCK: Variant("dense", fuse=False, graph=False),
    "tilewise, dense": Variant("dense", graph=False),
    DENSE: Variant("dense"),
    SPARSE: Variant(STA),
    HALF: Variant(tilewise.STA(density=0.5)),
    DRAFT: Variant(tilewise.Draft(density=0.3, min_tokens=0)),
    FP8_CACHE: Variant("dense", storage="fp8"),
    TINY_DECODER: Variant(STA, tiny=True),
}
FORWARDS = (STOCK, "tilewise, dense", DENSE, HALF, SPARSE, DRAFT, FP8_CACHE)
WHOLE = (STOCK, DENSE, HALF, SPARSE, TINY_DECODER)


@dataclass(frozen=True)
class Work:
    """A model, pixels by name, latents (height, width), latent frames of a chunk, and of window and sink.

    variants: names. decoded: whole chunks, with the decoder. frames: so many of them at least. apart: the VAE has a GPU of its
    own. changes: of the prompt, too. fp8: the denoiser's linear layers in 8 bits by torchao, in this and all later works of the
    model.
    """

    model: str
    pixels: str
    latents: tuple[int, int]
    window: int
    sink: int = 3
    chunk: int = 3
    decoded: bool = False
    frames: int = 0
    apart: bool = False
    changes: bool = False
    fp8: bool = False
    variants: tuple[str, ...] = FORWARDS

    @property
    def name(self) -> str:
        said = [f"{self.model} {self.pixels}", f"window {self.window}"]
        said += ["linear layers in fp8"] * self.fp8 + ["end to end"] * self.decoded
        said += ["changes of the prompt"] * self.changes
        said += ["VAE on a second GPU"] * self.apart
        return ", ".join(said + [f"{self.frames:,} frames"] * (self.frames > 0))


WAN, PIXELS = "Wan2.1-1.3B", ("480×832", (60, 104))
WORKS = [
    Work(WAN, *PIXELS, 12),
    Work(WAN, *PIXELS, 21),
    Work(WAN, *PIXELS, 12, decoded=True, variants=WHOLE),
    Work(WAN, *PIXELS, 12, decoded=True, frames=9_600, variants=(SPARSE,)),  # ten minutes at 16 frames a second
    Work(WAN, *PIXELS, 12, decoded=True, changes=True, variants=(SPARSE,)),
    Work(WAN, *PIXELS, 12, decoded=True, apart=True, variants=(DENSE, HALF, SPARSE)),
    Work("Wan2.1-14B, 10 layers", *PIXELS, 12),
    Work("Wan2.1-14B", *PIXELS, 12, variants=(HALF, SPARSE)),
    Work("Wan2.1-14B", *PIXELS, 12, decoded=True, variants=(HALF, SPARSE)),
    Work("Wan2.1-14B", *PIXELS, 12, decoded=True, apart=True, variants=(SPARSE,)),
    Work("Wan2.1-14B", *PIXELS, 12, fp8=True, variants=(STOCK, HALF, SPARSE)),
    Work("Wan2.1-14B", *PIXELS, 12, decoded=True, fp8=True, variants=(SPARSE, TINY_DECODER)),
    Work("Wan2.1-14B", *PIXELS, 12, decoded=True, apart=True, fp8=True, variants=(SPARSE,)),
]
SMALL = ("16×16", (2, 2), 4, 2, 2)
TINY = [
    Work("tiny", *SMALL),
    Work("tiny", *SMALL, decoded=True, changes=True, variants=(SPARSE,)),
    Work("tiny", *SMALL, decoded=True, frames=10, variants=(TINY_DECODER,)),
]
HOWS = ("recache", "flush", "blend")  # ways to change a prompt


def run(device: torch.device, seconds: float, works: list[Work]) -> Iterator[dict[str, Any]]:
    """One row a work."""
    model, built = None, ""
    for work in works:
        if work.model != built:
            model = None
            gc.collect()
            model, built = build(CONFIGS[work.model], device, torch.bfloat16), work.model
        row = {"name": work.name, "model": work.model, "window": work.window, "sink": work.sink, "chunk": work.chunk}
        try:
            if work.fp8:
                fp8_linears(model)
        except Exception as error:
            yield {**row, "variants": [], "missing": dict.fromkeys(work.variants, reason(error))}
            continue
        yield {**row, **(_end_to_end if work.decoded else _forwards)(work, model, device, seconds)}


def _forwards(work: Work, model: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds of one forward by variant, and each variant's difference from stock blocks."""
    variants: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    stock = None
    for name in work.variants:
        variant = VARIANTS[name]
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
                density = _density(causal, model, inputs)
        except Exception as error:
            missing[name] = reason(error)
            continue
        stock = out if stock is None else stock
        error = float((out - stock).norm() / stock.norm())
        fallbacks = sorted(report.fallbacks)
        told = {"graph_refused": refused} if refused else {}
        variants.append(
            {"name": name, **timing.to_dict(), "error": error, "density": density, "fallbacks": fallbacks, **told}
        )
    return {"variants": variants, "missing": missing}


def _end_to_end(work: Work, model: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Frames a second of whole chunks by variant; milliseconds are of a chunk."""
    variants: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    if work.apart and (device.type != "cuda" or torch.cuda.device_count() < 2):
        return {"variants": [], "missing": dict.fromkeys(work.variants, "there is no second GPU")}
    vae = _vae(work, torch.device("cuda", 1) if work.apart else device)
    for name in work.variants:
        variant = VARIANTS[name]
        try:
            with _causal(work, model, variant) as causal, _video(work, model, vae, causal, device, variant) as video:
                for _ in range(2 * work.window // work.chunk):
                    next(video)
                before_bytes = _allocated(device)
                times, frames, begin = [], 0, time.perf_counter()
                while len(times) < 3 or frames < work.frames or time.perf_counter() - begin < 4 * seconds:
                    before = time.perf_counter()
                    frames += len(next(video).frames)
                    times.append(time.perf_counter() - before)
                grown = _allocated(device) - before_bytes
                changes = {how: _prompt_changes(video, how) for how in HOWS} if work.changes else {}
                refused = causal.graphs.refused
                causal.begin()
                density = _density(causal, model, _inputs(work, model, device))
            first = None
            if not work.frames:
                with (
                    _causal(work, model, variant) as causal,
                    _video(work, model, vae, causal, device, variant) as video,
                ):
                    before = time.perf_counter()
                    next(video)
                    first = time.perf_counter() - before
        except Exception as error:
            missing[name] = reason(error)
            continue
        ordered, median = sorted(times), statistics.median(times)
        variants.append(
            {
                "name": name,
                "ms": 1e3 * median,
                "ms_min": 1e3 * ordered[0],
                "ms_max": 1e3 * ordered[-1],
                "runs": len(times),
                "ms_p95": 1e3 * ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))],
                "fps": frames / sum(times),
                "density": density,
                **({"graph_refused": refused} if refused else {}),
                **({} if first is None else {"first_ms": 1e3 * first}),
                **({"prompt_changes": changes} if changes else {}),
                **({"frames": frames, "stalls": _stalls(times, frames), "grown_bytes": grown} if work.frames else {}),
            }
        )
    return {"variants": variants, "missing": missing}


def _prompt_changes(video: VideoStream, how: str, times: int = 3) -> dict[str, Any]:
    """Median milliseconds from ``set_prompt`` until frames of the new prompt are read, those of the chunks of the old prompt that
    come before it among them, and the most such chunks."""
    found, old = [], []
    for number in range(times):
        prompt = f"{how} {number}"
        before = time.perf_counter()
        video.set_prompt(prompt, how)
        read = 0
        while next(video).prompt != prompt:
            read += 1
        found.append(1e3 * (time.perf_counter() - before))
        old.append(read)
        for _ in range(4):  # what was forgotten is full again
            next(video)
    return {"ms": statistics.median(found), "old_chunks": max(old)}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _stalls(times: list[float], frames: int) -> int:
    """Chunks that came later than their frames last at 16 a second: a player without a buffer would have waited."""
    return sum(seconds > frames / len(times) / 16 for seconds in times)


def _density(causal: CausalDenoiser, model: Any, inputs: tuple[torch.Tensor, ...]) -> float:
    """Kept pairs of a forward against a full window, which runs without a graph to be counted."""
    tilewise.summary(model, reset=True)
    model(*inputs, return_dict=False)
    return tilewise.summary(model).density


@contextlib.contextmanager
def _causal(work: Work, model: Any, variant: Variant) -> Iterator[CausalDenoiser]:
    cache = tilewise.KVCache(window=work.window, sink=work.sink, storage=variant.storage)
    grid = Grid(work.chunk, work.latents[0] // 2, work.latents[1] // 2)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(tilewise.patched(model, variant.method, steps=(0.0, 1.0), fuse=variant.fuse))
        yield stack.enter_context(CausalDenoiser(model, cache, grid=grid, cuda_graph=variant.graph))


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


def _tiny_decoder(device: torch.device) -> TinyStreamingDecoder:
    """The size of taew2_1 (https://github.com/madebyollin/taehv)."""
    with device:
        decoder = TinyDecoder(TinyShape(16, (256, 128, 64, 64), (1, 2, 2)))
    return TinyStreamingDecoder(decoder.to(torch.bfloat16).eval().requires_grad_(False))


def _video(
    work: Work, model: Any, vae: Any, causal: CausalDenoiser, device: torch.device, variant: Variant
) -> VideoStream:
    """A stream over these parts, without a text encoder."""
    recipe = CausalRecipe(chunk=work.chunk, window=work.window, sink=work.sink)
    states = TextStates(_text(model, device))
    sampler = CausalSampler(
        [causal], recipe, states, shape=(16, *work.latents), generator=torch.Generator(device).manual_seed(0), device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    decoder = FrameDecoder(
        _tiny_decoder(device) if variant.tiny else streaming_decoder(vae), SPACE, vae, next(vae.parameters()).device
    )
    prompts = Prompts(lambda prompt: states.positive, "random", states)
    source = CausalSource(sampler, prompts, recipe, window=work.window, chunk=work.chunk)
    return VideoStream(
        source, decoder, frames=None, fps=16.0, temporal=4, close=lambda: None, ahead=int(device.type == "cuda")
    )
