"""A clip larger than its model was trained for, coherent: FreeSwim's two stages (arXiv 2511.14712) around a stock pipeline.

    native stage   the stock pipeline at its own size                                                       what the clip shows
    in between     frames upscaled, encoded, noised to σ(strength)     (or the latents themselves, upscaled)
    target stage   the remaining steps: inward-window attention, guided by a full path (dual_path.py)     its detail

The pipeline's own loop runs both stages, with its scheduler entered part-way for the second: what works with it (guidance, two
denoisers, LoRA, offloading) works here. Latents of one stage are all that is passed on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilewise.pipelines.conditioning.roles import share_of_steps
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.generate import Clip, Progress, content_score, refuse_patched
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import nothing_left, stock_call
from tilewise.pipelines.highres.one_stage import (
    OneStageClip,
    in_one_stage,
    make_in_one_stage,
    one_stage,
    refuse_stages,
)
from tilewise.pipelines.highres.partial_schedule import entered_at, noised, schedule_calls
from tilewise.pipelines.highres.preparation import Work, few_steps, prepare, trained_grid
from tilewise.pipelines.highres.settings import HighresSettings
from tilewise.pipelines.highres.upscale import upscale_frames, upscale_latents
from tilewise.pipelines.latent_spaces.base import latent_space, tiled
from tilewise.pipelines.loading.loras import require_loras
from tilewise.pipelines.media.video import to_uint8
from tilewise.pipelines.memory.limits import saving
from tilewise.pipelines.memory.plan import MemoryPlan
from tilewise.pipelines.quality.coherence import Coherence, coherence
from tilewise.plugins.autoencoders.patched_vae import fused_vae
from tilewise.plugins.config import MethodLike
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.guidance.dual_path import two_paths
from tilewise.plugins.guidance.rope_scaling import scaled_rope
from tilewise.plugins.hooks.temporary_attribute import temporary_attribute
from tilewise.plugins.patching import denoisers_of, patched
from tilewise.plugins.summary import summary


@dataclasses.dataclass(frozen=True)
class HighresClip:
    """A clip and how it came about.

    clip: at the target; its settings say the target size and window, its seconds the target stage's phases. native: the stage
    before. options: the second stage's. plan: memory, as planned. coherence: of the clip against its native stage.
    forwards: of the denoisers at the target: "refreshed" with both paths, "reused" with cached cross-attention, "unguided".
    """

    clip: Clip
    native: Clip
    options: HighresSettings
    plan: MemoryPlan
    coherence: Coherence
    forwards: dict[str, int]

    def __repr__(self) -> str:
        return f"HighresClip({self.clip!r}, native {self.native!r})"

    @property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 (T, H, W, 3)."""
        return self.clip.frames

    def to_dict(self) -> dict[str, Any]:
        """JSON values only, without frames: what a clip's metadata says of its making."""
        return {
            "options": self.options.to_dict(),
            "native": {"height": self.native.settings.height, "width": self.native.settings.width,
                       "method": self.native.settings.method.to_dict(), "seconds": self.native.seconds},
            "plan": self.plan.to_dict(),
            "coherence": self.coherence.to_dict(),
            "forwards": self.forwards,
        }  # fmt: skip


def highres(
    pipe: Any,
    prompt: str,
    *,
    height: int,
    width: int,
    native: tuple[int, int] | None = None,
    native_method: MethodLike = "dense",
    progress: Progress | None = None,
    on_native: Callable[[Clip], None] | None = None,
    options: HighresSettings | None = None,
    model: str = "",
    negative: str = "",
    frames: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    image: str | None = None,
    last_image: str | None = None,
    video: str | None = None,
    mask: str | None = None,
    reference: Sequence[str] = (),
    **given: Any,
) -> HighresClip | OneStageClip:
    """Makes a clip of 2–4 times the side length that the model was trained at. A UNet's is made in one stage (``one_stage``),
    which takes none of the options of two.

    Args:
        pipe: a loaded pipeline of a kind in ``latent_spaces`` (Wan, SkyReels-V2, LTX, Kandinsky 5, HunyuanVideo, 1.5,
            EasyAnimate, Mochi, Flux, Flux.2, Chroma, Qwen-Image, SD 3, Z-Image; some from pictures too, see docs/models.md), or
            with the UNet of SD 1.5, SD 2.1 or SDXL; not patched; left as it was found, whatever happens.
        prompt: one prompt. height, width: of the clip, pixels.
        native: (height, width) of the first stage, pixels; default: the model's own, or where the clip has another shape,
            one like it of about as many pixels. One that is given and has another shape than the clip is a UserWarning.
        native_method: the first stage's attention.
        progress: called as progress(phase, done, total), with phases "native: denoise", "upscale", "denoise" and the like.
        on_native: called with the first stage's clip as soon as it is there, to be written or shown.
        options: the second stage; single ones may be given by name instead (``strength=0.6``).
        negative, frames, steps, guidance, seed: as for ``resolve_settings``; both stages have the same.
        image, last_image, video, mask, reference: paths of files that the clip is made from, where the pipeline takes them. Each
            stage fits and encodes them at its own size. ``strength`` is the second stage's, whatever the pipeline's own says.

    Raises:
        ConfigError: a size that the model does not take (with the nearest one that it does), one smaller than native, a plan of
            memory that does not fit, options that cannot be.
        UnsupportedModelError: another pipeline, or one with sparse attention of its own (Kandinsky 5's nabla).
    """
    if not isinstance(prompt, str):
        raise ConfigError("highres makes one clip of one prompt; for several, call it for each")
    shared = {
        "model": model, "negative": negative, "frames": frames, "steps": steps, "guidance": guidance, "seed": seed,
        "image": image, "last_image": last_image, "video": video, "mask": mask, "reference": reference,
    }  # fmt: skip
    if in_one_stage(pipe):
        said = {**given, "native": native, "options": options, "on_native": on_native}
        refuse_stages([name for name, value in said.items() if value is not None])
        method = None if native_method == "dense" else native_method
        return make_in_one_stage(pipe, one_stage(pipe, prompt, height, width, method, shared), progress)
    options = dataclasses.replace(options or HighresSettings(), **_known(given))
    work = prepare(pipe, prompt, height, width, native, native_method, options, shared)
    refuse_patched(pipe)
    for note in work.notes:
        warnings.warn(note, stacklevel=2)
    return make(pipe, work, progress, on_native)


def make(
    pipe: Any, work: Work, progress: Progress | None = None, on_native: Callable[[Clip], None] | None = None
) -> HighresClip:
    """Runs what `prepare` decided; see `highres`."""
    tell = progress or (lambda phase, done, total: None)
    require_loras(pipe, work.target.lora)
    options, target, space = work.options, work.target, latent_space(pipe)
    saved = ["offload"] if work.plan.offload else []
    with saving(pipe, saved), nothing_left(pipe), fused_vae(pipe):
        with schedule_calls(pipe) as asked:
            native_latents, native_seconds, report = _stage(pipe, work.native, lambda p, *n: tell(f"native: {p}", *n))
        tell("native: decode", 0, 1)
        start = time.perf_counter()
        with tiled(pipe.vae, work.plan.native_tiling):
            native_frames = space.decode(pipe, native_latents)
        native_seconds["decode"] = time.perf_counter() - start
        native_seconds["total"] += native_seconds["decode"]
        tell("native: decode", 1, 1)
        native = Clip(_pixels(native_frames), native_seconds, report, work.native)
        if on_native is not None:
            on_native(native)

        tell("upscale", 0, 1)
        start = time.perf_counter()
        with tiled(pipe.vae, work.plan.vae_tiling):
            clean = _upscaled(pipe, native_frames, native_latents, work)
        seconds = {"upscale": time.perf_counter() - start}
        tell("upscale", 1, 1)
        del native_latents
        assert options.strength is not None and not isinstance(options.flow_shift, str)  # by `prepare`
        with entered_at(pipe, target.steps, options.strength, options.flow_shift) as scheduler:
            generator = torch.Generator("cpu").manual_seed(
                target.seed + 1
            )  # other noise than the first stage began with
            latents = noised(clean, scheduler, asked[-1], work.grid.video, generator, space.mu)
            del clean
            with _guided(pipe, work) as paths:
                latents, more, report = _stage(pipe, target, tell, latents)
                forwards = _forwards(paths)
        seconds.update(more)
        tell("decode", 0, 1)
        start = time.perf_counter()
        with tiled(pipe.vae, work.plan.vae_tiling):
            frames = _pixels(space.decode(pipe, latents))
        seconds["decode"] = time.perf_counter() - start
        seconds["total"] += seconds["decode"] + seconds["upscale"]
        tell("decode", 1, 1)
    clip = Clip(frames, seconds, report, target)
    return HighresClip(clip, native, options, work.plan, coherence(frames, native.frames), forwards)


def warm_up(pipe: Any, work: Work, progress: Progress | None = None) -> float:
    """`generate.warm_up` for two stages: `few_steps` of both, thrown away; returns its seconds."""
    tell = progress or (lambda phase, done, total: None)
    start = time.perf_counter()
    tell("warm-up", 0, 1)
    make(pipe, few_steps(pipe, work))
    tell("warm-up", 1, 1)
    return time.perf_counter() - start


def add_content_score(pipe: Any, made: HighresClip) -> HighresClip:
    """With what of the prompt both stages show, for models whose world the detector knows."""
    clip, native = (
        dataclasses.replace(clip, content=content_score(pipe, clip.settings, clip.frames))
        for clip in (made.clip, made.native)
    )
    return dataclasses.replace(made, clip=clip, native=native)


def _stage(
    pipe: Any, settings: GenerateSettings, tell: Progress, latents: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float], Any]:
    """One run of the pipeline, from and to latents (1, C, t, h, w); seconds by phase; what attention did, None if stock."""

    space = latent_space(pipe)
    given: dict[str, Any] = {}
    mixed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if latents is not None and space.mixes:
        prepare = functools.partial(space.begun, pipe, pipe.prepare_latents, latents)
        mixed = temporary_attribute(pipe, "prepare_latents", prepare)
    elif latents is not None:
        given["latents"] = space.packed(pipe, latents)
    if latents is not None and share_of_steps(pipe, None) is not None:
        given["strength"] = 1.0  # of the steps that are left: the picture that is changed is what the stage begins with
    method = contextlib.nullcontext(pipe) if settings.is_dense else patched(pipe, settings.method)
    owner = latents is None  # the second stage is patched around the paths already
    start = time.perf_counter()
    with mixed, method if owner else contextlib.nullcontext(pipe):
        out = stock_call(
            pipe, settings, lambda done, total, _: tell("denoise", done, total), output_type="latent", **given
        )
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        report = None if settings.is_dense else summary(pipe)
    spent = time.perf_counter() - start
    out = space.unpacked(pipe, out, space.shape(pipe, settings.height, settings.width, settings.frames))
    return out, {"encode": 0.0, "denoise": spent, "decode": 0.0, "total": spent}, report


def _upscaled(pipe: Any, frames: NDArray[np.float32], latents: torch.Tensor, work: Work) -> torch.Tensor:
    """The native stage at the target's size, as latents."""
    height, width = work.target.height, work.target.width
    space = latent_space(pipe)
    if work.options.upscale == "latent":
        return upscale_latents(latents, *space.shape(pipe, height, width, work.target.frames)[1:])
    return space.encode(pipe, upscale_frames(frames, height, width, work.options.upscale))


@contextlib.contextmanager
def _guided(pipe: Any, work: Work) -> Iterator[dict[str, Any]]:
    """The target stage's patch: window, paths, rotary frequencies."""
    options = work.options
    rope: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if options.rope or options.rope_time:
        rope = scaled_rope(pipe, trained_grid(pipe), spatial=options.rope, temporal=options.rope_time)
    with patched(pipe, work.target.method), rope:
        if options.global_path == "none":
            yield {}
            return
        count = len(denoisers_of(pipe))
        near = None if work.plan.cache_on_device == work.plan.cache else work.plan.cache_on_device // count
        path: Any = options.global_path
        guided: Any = options.guided
        with two_paths(pipe, refresh=options.refresh, global_path=path, guided=guided, cache_bytes=near) as paths:
            yield paths


def _forwards(paths: dict[str, Any]) -> dict[str, int]:
    names = ("refreshed", "reused", "unguided")
    return {name: sum(getattr(p.counts, name) for p in paths.values()) for name in names}


def _pixels(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    try:
        return to_uint8(frames)
    except ValueError as error:
        raise OutputError(f"the pipeline made no clip: {error}") from error


def _known(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the second stage by name; HighresSettings.from_dict refuses others."""
    HighresSettings.from_dict(given)
    return given
