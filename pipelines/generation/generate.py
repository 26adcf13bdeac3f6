"""Generate one clip with a pipeline and time each phase. The pipeline is left unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.conditioning.roles import share_of_steps
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import stock_call
from tilewise.pipelines.generation.tiny_decoding import decode_latents, tiny_decoder_of
from tilewise.pipelines.loading.loras import require_loras
from tilewise.pipelines.loading.model_defaults import least_steps, model_defaults
from tilewise.pipelines.media.video import to_uint8
from tilewise.pipelines.quality.content_detection import analyse
from tilewise.pipelines.quality.content_score import parse_prompt, score
from tilewise.plugins.context_parallel.checks import is_divided
from tilewise.plugins.diffusers_compat import execution_device
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.denoisers import DENOISERS, denoisers_of
from tilewise.plugins.patching import is_patched, patched
from tilewise.plugins.summary import Summary, summary
from tilewise.plugins.text_format import counted

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as progress(phase, done, total): phase is "encode", "denoise" or "decode", done and total count its steps."""

Preview: TypeAlias = Callable[[int, int, torch.Tensor], None]
"""Called as preview(done, total, latents) after each denoising step, with the latents as the pipeline holds them: on its device,
not to be written to. A GPU has not computed them yet; whoever reads them waits."""

LOG = logging.getLogger("tilewise.generate")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A generated clip.

    frames: uint8 (T, H, W, 3). settings: what made it. summary: what the attention calls did; None for dense.
    seconds: "encode" (text, noise), "denoise", "decode" (VAE to pixels) and "total", wall-clock.
    content: what of the prompt the clip shows, attribute by attribute, None where the prompt says nothing; as a whole
    None until `add_content_score` has looked, and for models whose world the clip-content detector does not know.
    """

    frames: NDArray[np.uint8]
    seconds: dict[str, float]
    summary: Summary | None
    settings: GenerateSettings
    content: dict[str, bool | None] | None = None

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        size = f"{counted(count, 'frame')} of {height}×{width}"
        return f"Clip({size}, {self.settings.method.label}, {self.seconds['total']:.1f} s)"


def generate(
    pipe: Any, settings: GenerateSettings, progress: Progress | None = None, *, preview: Preview | None = None
) -> Clip:
    """Runs a pipeline with the method of `settings` and the files that they name, and takes the method out again.

    Method "dense" runs the stock pipeline without any patch, but where several processes divide it. Whatever happens,
    KeyboardInterrupt included, the pipeline is usable and unpatched afterwards; `cancellation.cancellable` stops it from another
    thread.

    Raises ConfigError if the pipeline is already patched (which method was meant?) or has other LoRAs, UnsupportedModelError for
    a pipeline that needs more than settings can say, OutputError if the model's output is not a picture (NaN).
    """
    refuse_patched(pipe)
    require_loras(pipe, settings.lora)
    report = None
    if settings.is_dense and not any(
        map(is_divided, denoisers_of(pipe).values())
    ):  # which stock attention may not serve
        output, seconds = run(pipe, settings, progress, preview=preview)
    else:
        with patched(pipe, settings.method):
            output, seconds = run(pipe, settings, progress, preview=preview)
            report = summary(pipe)
    try:
        frames = to_uint8(output)
    except ValueError as error:
        raise OutputError(f"the pipeline made no clip: {error}") from error
    return Clip(frames, seconds, report, settings)


def refuse_patched(pipe: Any) -> None:
    """Raises ConfigError for a pipeline that is already patched."""
    if is_patched(pipe):
        raise ConfigError("the pipeline is already patched; call tilewise.unpatch(pipe) first, then generate")


def run(
    pipe: Any,
    settings: GenerateSettings,
    progress: Progress | None = None,
    *,
    decode: bool = True,
    preview: Preview | None = None,
) -> tuple[Any, dict[str, float]]:
    """Calls the pipeline as it is; returns the first clip, (T, H, W, 3) in 0..1 or latents, and seconds by phase.

    An image is a clip of one frame. With a tiny autoencoder in the settings the pipeline's own VAE does not run.

    A preview that raises an Exception is logged and not called again; the run goes on.
    """
    tell = progress or (lambda phase, done, total: None)
    clock = _Clock(execution_device(pipe, pipe.device))
    tiny = tiny_decoder_of(pipe, settings.decode) if decode else None  # read before anything runs

    def first_forward(*_: Any) -> None:
        if "denoise" not in clock.start:
            clock.enter("denoise")
            tell("encode", 1, 1)
            tell("denoise", 0, settings.steps)

    def step_done(done: int, total: int, latents: torch.Tensor) -> None:
        nonlocal preview
        tell("denoise", done, total)
        if preview is not None:
            try:
                preview(done, total, latents)
            except Exception as error:  # a clip is worth more than the previews of it
                LOG.warning("no more previews of this run: %s: %s", type(error).__name__, error)
                preview = None
        if done == total:
            clock.enter("decode")
            tell("decode", 0, 1)

    with _forward_hooks(pipe, first_forward):
        tell("encode", 0, 1)
        clock.enter("encode")
        output = stock_call(pipe, settings, step_done, output_type="np" if decode and tiny is None else "latent")
        if tiny is not None:
            output = decode_latents(pipe, tiny, output, settings)[None]
        clock.enter("end")
    tell("decode", 1, 1)
    first = output[0]
    return first[None] if decode and np.ndim(first) == 3 else first, clock.seconds()


def warm_up(pipe: Any, settings: GenerateSettings, progress: Progress | None = None) -> float:
    """Runs one denoising step (the fewest that the pipeline takes), dense and, if the method is not dense, sparse, and throws it
    away; returns its seconds.

    At the full size, and the dense one is decoded too: that loads libraries, compiles or picks kernels and fills the
    allocators' pools, so that the run after it is measured as every later one. progress: as in `run`, one phase "warm-up".
    """
    tell = progress or (lambda phase, done, total: None)
    passes = 1 if settings.is_dense else 2
    one_step = dataclasses.replace(settings, steps=least_steps(pipe))
    if share_of_steps(pipe, settings.strength) is not None:  # of one step, a share below 1 is none
        one_step = dataclasses.replace(one_step, strength=1.0)
    start = time.perf_counter()
    tell("warm-up", 0, passes)
    run(pipe, one_step)
    tell("warm-up", 1, passes)
    if not settings.is_dense:
        # On its usual schedule the method might leave the only step dense.
        with patched(pipe, dataclasses.replace(settings.method, steps=(0.0, 1.0))):
            run(pipe, one_step, decode=False)
        tell("warm-up", 2, passes)
    return time.perf_counter() - start


def add_content_score(pipe: Any, clip: Clip) -> Clip:
    """The clip with its `content` filled in. A step of its own: a clip that took long to make can be written first."""
    return dataclasses.replace(clip, content=content_score(pipe, clip.settings, clip.frames))


def content_score(pipe: Any, settings: GenerateSettings, frames: NDArray[np.uint8]) -> dict[str, bool | None] | None:
    """What of the prompt a clip (T, H, W, 3) shows, by the detector; None if it cannot judge this model. All is None for a
    prompt that it cannot read."""
    if model_defaults(pipe).world != "shapes":
        return None
    return score(analyse(frames), parse_prompt(settings.prompt))


@contextlib.contextmanager
def _forward_hooks(pipe: Any, hook: Callable[..., None]) -> Iterator[None]:
    modules = [getattr(pipe, name, None) for name in DENOISERS]
    handles = [module.register_forward_pre_hook(hook) for module in modules if isinstance(module, torch.nn.Module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Clock:
    """When each phase began. GPU work is awaited at the borders of phases only, which costs nothing measurable."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.start[phase] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        begins = [self.start[phase] for phase in ("encode", "denoise", "decode", "end")]
        spans = dict(zip(("encode", "denoise", "decode"), np.diff(begins).tolist(), strict=True))
        return {**spans, "total": begins[-1] - begins[0]}
