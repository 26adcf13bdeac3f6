"""One denoiser forward at real size: stock diffusers against the patched one. Real architecture, random weights.

Stock runs with PyTorch's own choice of attention, with cuDNN's, and compiled; ours with a method on every block and no dense
step, as it is and compiled. Compiled means ``compile_repeated_blocks``: block by block, as diffusers recommends, which takes
seconds where compiling the whole model takes minutes.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import tilewise
from benchmarks.layers import shortened
from benchmarks.peers import reason
from benchmarks.profiling import profile_forward
from benchmarks.timing import measure

# The published configs of the transformers; the 14B model with 10 of its 40 layers, whose time is 10 / 40 of the blocks'.
CONFIGS: dict[str, dict[str, Any]] = {
    "Wan2.1-1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan2.1-14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "Wan2.1-14B, 10 layers": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 10},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 128, "num_layers": 2, "text_dim": 32},
}
SHARED = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}


@dataclass(frozen=True)
class Size:
    """A config, pixels by name, and the latent frames, height and width that they are."""

    model: str
    pixels: str
    latents: tuple[int, int, int]
    thorough: bool = False  # also what exact attention gains from compiling, and where its time goes

    @property
    def name(self) -> str:
        return f"{self.model} {self.pixels}"


SIZES = [
    Size("Wan2.1-1.3B", "480×832×81", (21, 60, 104), thorough=True),
    Size("Wan2.1-1.3B", "720×1280×81", (21, 90, 160)),
    Size("Wan2.1-1.3B", "1080×1920×81", (21, 136, 240)),  # 1088 rows: Wan's sizes are multiples of 16
    Size("Wan2.1-14B, 10 layers", "720×1280×81", (21, 90, 160)),
]
TINY = [Size("tiny", "64×64×9", (5, 16, 16), thorough=True)]

NATIVE, CUDNN, COMPILED = "stock", "stock, cuDNN", "stock, torch.compile"
METHODS = {  # name → (method, whether norms, RoPE, modulation and gates are fused too)
    "tilewise, dense": ("dense", True),
    "tilewise, STA window (3,3,3)": (tilewise.STA(), True),
    "tilewise, STA density 0.2, not fused": (tilewise.STA(density=0.2), False),
    "tilewise, STA density 0.2": (tilewise.STA(density=0.2), True),
    "tilewise, STA density 0.2, int8": (tilewise.Config(tilewise.STA(density=0.2), precision="int8"), True),
    "tilewise, STA density 0.15, int8": (tilewise.Config(tilewise.STA(density=0.15), precision="int8"), True),
    # However short: without a minimum length, which the tiny size is below.
    "tilewise, draft density 0.25": (tilewise.Draft(density=0.25, min_tokens=0), True),
}
EIGHT_BITS = [name for name in METHODS if name.endswith("int8")]
LOOKED_INTO = "tilewise, STA density 0.2"  # compiled and profiled too; with ``Size.thorough``, so is dense
EXACT = (CUDNN, COMPILED, "tilewise, dense")  # the same mathematics as stock: their difference from it is rounding


def build(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A Wan denoiser with random weights, its parameters in the dtypes that ``from_pretrained(torch_dtype=dtype)`` gives."""
    from diffusers import WanTransformer3DModel

    with device:
        model: Any = WanTransformer3DModel(**{**SHARED, **config})
    model.eval().requires_grad_(False)
    kept: Any = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


@contextlib.contextmanager
def compiled(model: nn.Module, backend: str) -> Iterator[None]:
    """Every transformer block compiled, and none afterwards."""
    torch.compiler.reset()
    counters.clear()
    model.compile_repeated_blocks(backend=backend, dynamic=False)  # type: ignore[operator]
    try:
        yield
    finally:
        for module in model.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        torch.compiler.reset()


class Bench:
    """One size of one model: its inputs, stock output, and what has been measured."""

    def __init__(
        self, size: Size, model: Any, device: torch.device, seconds: float, backend: str, only: str = ""
    ) -> None:
        dtype = model.proj_out.weight.dtype
        generator = torch.Generator(device).manual_seed(0)
        self.size, self.model, self.device, self.seconds, self.backend = size, model, device, seconds, backend
        self.only = re.compile(only)
        self.latents = torch.randn(1, 16, *size.latents, generator=generator, device=device).to(dtype)
        self.text = torch.randn(1, 512, model.config.text_dim, generator=generator, device=device).to(dtype)
        self.timestep = torch.tensor([500.0], device=device)
        self.stock: torch.Tensor | None = None
        self.variants: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.time: dict[str, Any] = {}

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.latents, self.timestep, self.text, return_dict=False)[0]

    def variant(self, name: str, context: Callable[[], Any], exact: bool, profiled: bool, compiles: bool) -> None:
        """Warm up, profile, and time the forward within ``context()``. What fails is kept, by name."""
        if name != NATIVE and not self.only.search(name):
            return
        on_gpu = self.device.type == "cuda"
        try:
            with context():
                begin = time.perf_counter()
                # A patched layer may compile anew for each block, which belongs into the warm-up: there it is a whole forward.
                whole = compiles and tilewise.is_patched(self.model)
                # Two layers, so that what is compiled again for a second one has been.
                with contextlib.nullcontext() if whole else shortened(self.model, lambda _: 2):
                    self.forward()
                if on_gpu:
                    torch.cuda.synchronize(self.device)
                warmup = time.perf_counter() - begin
                breaks = sum(counters["graph_break"].values())
                if profiled:
                    self.time[name] = profile_forward(self.forward, self.device)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
                last: list[torch.Tensor] = []

                def forward() -> None:
                    last[:] = []
                    last.append(self.forward())

                timing = measure(forward, self.device, seconds=self.seconds, warmup=0, flush=False)
                facts: dict[str, Any] = {"name": name, **timing.to_dict(), "warmup_seconds": round(warmup, 1)}
                if on_gpu:
                    facts["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
                if compiles:
                    facts["graph_breaks"] = breaks
                facts.update(self._facts_of_patch())
        except Exception as error:
            self.missing[name] = reason(error)
            return
        if self.stock is None:
            self.stock = last[0]
        elif exact:
            want = self.stock.float()
            facts["relative_error"] = float((last[0].float() - want).norm() / want.norm())
        self.variants.append(facts)

    def _facts_of_patch(self) -> dict[str, Any]:
        if not tilewise.is_patched(self.model):
            return {"density": 1.0}
        return {"density": tilewise.summary(self.model).density}

    def result(self) -> dict[str, Any]:
        pt, ph, pw = self.model.config.patch_size
        t, h, w = self.size.latents
        stock = {v["name"]: v["ms"] for v in self.variants if v["name"] in (NATIVE, CUDNN, COMPILED)}
        for variant in self.variants:
            variant["over"] = {name: ms / variant["ms"] for name, ms in stock.items()}
        return {
            "name": self.size.name,
            "grid": [t // pt, h // ph, w // pw],
            "layers": len(self.model.blocks),
            "dtype": str(self.latents.dtype).removeprefix("torch."),
            "variants": self.variants,
            "time": self.time,
            "missing": self.missing,
        }


def run_size(
    size: Size, model: Any, device: torch.device, seconds: float, backend: str, only: str = ""
) -> dict[str, Any]:
    """All variants of one size, or stock and those in whose name ``only`` is found. ``backend`` is torch.compile's."""
    bench = Bench(size, model, device, seconds, backend, only)

    @contextlib.contextmanager
    def stock(attention: str, compile_it: bool = False) -> Iterator[None]:
        model.set_attention_backend(attention)
        try:
            with compiled(model, backend) if compile_it else contextlib.nullcontext():
                yield
        finally:
            model.set_attention_backend("native")

    @contextlib.contextmanager
    def ours(method: Any, fuse: bool, compile_it: bool) -> Iterator[None]:
        with (
            tilewise.patched(model, method, steps=(0, 1), strict=True, fuse=fuse),
            compiled(model, backend) if compile_it else contextlib.nullcontext(),
        ):
            yield

    bench.variant(NATIVE, lambda: stock("native"), False, True, False)
    bench.variant(CUDNN, lambda: stock("_native_cudnn"), True, False, False)
    bench.variant(COMPILED, lambda: stock("native", True), True, False, True)
    for name, (method, fuse) in METHODS.items():
        if name in EIGHT_BITS and device.type != "cuda":
            continue
        exact = name in EXACT
        closely = name == LOOKED_INTO or (size.thorough and method == "dense")
        bench.variant(name, lambda method=method, fuse=fuse: ours(method, fuse, False), exact, closely, False)  # type: ignore[misc]
        if closely:
            bench.variant(
                f"{name}, torch.compile",
                lambda method=method, fuse=fuse: ours(method, fuse, True),  # type: ignore[misc]
                exact,
                False,
                True,
            )
    return bench.result()


def run(
    device: torch.device, seconds: float, sizes: list[Size], backend: str = "inductor", only: str = ""
) -> Iterator[dict[str, Any]]:
    """One result a size; a model is built once for the sizes that follow each other."""
    model, built = None, ""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for size in sizes:
        if size.model != built:
            model = None  # before the next one is made
            gc.collect()
            model, built = build(CONFIGS[size.model], device, dtype), size.model
        yield run_size(size, model, device, seconds, backend, only)
        if device.type == "cuda":
            torch.cuda.empty_cache()
