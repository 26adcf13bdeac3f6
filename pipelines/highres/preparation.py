"""Plan a clip past the training size: sizes, both stages' settings, the window, and memory.

Nothing here runs weights, so that it also holds for a skeleton, on a machine without the GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch

from tilewise.kernels.plans.layout import Grid
from tilewise.pipelines.conditioning.files import flag
from tilewise.pipelines.conditioning.inputs import files_of
from tilewise.pipelines.generation.resolve import resolve_settings
from tilewise.pipelines.generation.settings import OWN_VAE, GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.highres.partial_schedule import last_steps
from tilewise.pipelines.highres.settings import HighresSettings, pixels
from tilewise.pipelines.latent_spaces.base import latent_space
from tilewise.pipelines.loading.model_defaults import least_steps, model_defaults
from tilewise.pipelines.memory.plan import MemoryPlan, check_plan, plan_memory
from tilewise.pipelines.options import options_of
from tilewise.plugins.config import Config, MethodLike
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.guidance.global_path import check_denoisers, draft_refuses, global_paths
from tilewise.plugins.guidance.rope_scaling import rotary_modules
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.text_format import counted

SHARED_BY_STAGES = tuple(
    name for name in options_of(GenerateSettings) if name not in ("prompt", "method", "height", "width", "strength")
)
SAME_SHAPE = 1.05  # by which sides' ratios may differ: 480×832 stands for 1088×1920
NOTED = 1.08  # times that things come out wider or taller, from which on it is said


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything that was decided before anything runs. native, target: both stages. grid: the target's."""

    native: GenerateSettings
    target: GenerateSettings
    grid: Grid
    options: HighresSettings
    plan: MemoryPlan

    @property
    def notes(self) -> list[str]:
        """What the user should know of it before it is made."""
        first, target = self.native, self.target
        taller = target.height * first.width / (first.height * target.width)
        stretch = max(taller, 1 / taller)
        if stretch < NOTED:
            return []
        told = f"{stretch:.2f} times {'taller' if taller > 1 else 'wider'}"
        return [
            f"the native stage, {first.width}×{first.height}, has another shape than the clip of {target.width}×{target.height} "
            f"(width × height): all that it shows comes out {told}. Give sizes of one shape"
        ]


def prepare(
    pipe: Any,
    prompt: str,
    height: int,
    width: int,
    native: tuple[int, int] | None,
    native_method: MethodLike,
    options: HighresSettings,
    shared: dict[str, Any],
    device: torch.device | None = None,
) -> Work:
    """Both stages' settings and the plan of memory; raises as `highres` does.

    `pipe` may be a skeleton: `device` is then where it would run. shared: settings that both stages have.
    """
    space = latent_space(pipe)
    if shared.get("decode", OWN_VAE) != OWN_VAE:
        raise ConfigError(
            "highres decodes with the model's own VAE, which it also encodes with and runs in tiles where memory asks for it; "
            "leave decode out, or give decode=vae"
        )
    options = options.for_model(model_defaults(pipe), global_paths(pipe))
    assert options.strength is not None
    for name, wanted in (("height", height), ("width", width)):
        if not isinstance(wanted, int) or isinstance(wanted, bool):
            raise ConfigError(f"{name} must be a whole number of pixels, not {wanted!r}")
        if wanted < 1:
            raise ConfigError(f"{name} must be at least 1 pixel, and for highres the native stage's; not {wanted}")
    size = native_in_shape(pipe, height, width) if native is None else pixels("native", native)
    first = resolve_settings(pipe, prompt, method=native_method, height=size[0], width=size[1], **shared)
    for name, wanted, least in (("height", height, first.height), ("width", width, first.width)):
        if wanted < least:
            raise ConfigError(
                f"{name} {wanted} is smaller than the native stage's {least}: highres is for sizes past it. Generate at "
                f"{width}×{height} as usual, or give a smaller native size (native=(height, width))"
            )
    window = options.window or (first.height, first.width)
    seen = _grid(pipe, Size(*window, first.frames))
    grid = _grid(pipe, Size(height, width, first.frames))
    two = first.guidance > 1 and not space.distilled
    samples = 2 if two and space.one_batch else 1
    guided = 2 if two and (options.guided == "all" or space.one_batch) else 1
    method = Inward((seen.h, seen.w), temperature=options.temperature, far=options.far)
    planned: dict[str, Any] = {
        "height": height, "width": width, "frames": first.frames, "branches": guided, "samples": samples,
        "limit": options.max_memory, "device": device, "full_path": options.global_path != "none",
        "refresh": 1 if options.global_path == "none" else options.refresh, "native": (first.height, first.width),
    }  # fmt: skip
    plan = plan_memory(pipe, grid, **planned)
    what = f"a clip of {width}×{height} pixels and {counted(first.frames, 'frame')}"
    check_plan(plan, what)  # before a layout is made: that of an absurd size would fill the memory by itself
    layout = method.layout(grid)
    method.check_layout(layout)
    if options.global_path == "draft":
        if (refused := draft_refuses(layout)) is not None:
            raise ConfigError(
                f"global_path='draft' is not for a size of {width}×{height}: {refused}. Give 'pooled' or 'dense'"
            )
        plan = plan_memory(pipe, grid, **planned, draft=layout)
        check_plan(plan, what)
    for role in files_of(vars(first)):
        if role in space.unserved:
            raise ConfigError(f"highres takes no {flag(role)} with {type(pipe).__name__}: {space.unserved[role]}")
    target = resolve_settings(
        pipe, prompt, method=Config(method, steps=(0.0, 1.0), precision=options.precision),
        **{**shared, "height": height, "width": width},
    )  # fmt: skip
    call_arguments(pipe, target)
    _check_second_stage(pipe, target, options)
    return Work(first, target, grid, options, plan)


def native_in_shape(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """The model's own size, or where the clip has another shape one like it of about as many pixels: nothing is stretched.

    A model that takes no size of that shape, or draws well at its own alone, keeps that.
    """
    native, space = model_defaults(pipe), latent_space(pipe)
    own = native.height, native.width
    area, shape = own[0] * own[1], height / width
    sides = math.sqrt(area * shape), math.sqrt(area / shape)

    def off(size: tuple[int, int]) -> float:
        """From the clip's shape, as a logarithm."""
        return abs(math.log(size[0] / size[1] / shape))

    def takes(size: tuple[int, int]) -> bool:
        try:
            _grid(pipe, Size(*size, native.frames))
        except ConfigError:
            return False
        return space.alike(pipe, size, own)

    if native.one_shape or height * width < area:
        return own
    for size in (own, own[::-1]):
        if size[0] <= height and size[1] <= width and off(size) < math.log(SAME_SHAPE) and takes(size):
            return size
    # Multiples of this and that: the family knows which it takes.
    near = [{int(side // step + more) * step for step in (8, 16, 32, 64) for more in (0, 1)} for side in sides]
    smaller = [(h, w) for h, w in itertools.product(*near) if h <= height and w <= width and (h, w) != (height, width)]
    # The shape counts more than how many pixels they are.
    return min(
        filter(takes, smaller),
        key=lambda size: off(size) + abs(math.log(size[0] * size[1] / area)) / 4,
        default=own,
    )


def _check_second_stage(pipe: Any, target: GenerateSettings, options: HighresSettings) -> None:
    """What the second stage would raise about the pipeline: its scheduler, its rotary module, how its denoisers run."""
    assert options.strength is not None and not isinstance(options.flow_shift, str)  # by `for_model`
    last_steps(
        pipe, target.steps, options.strength, options.flow_shift
    )  # not put on the pipeline, which other plans may use
    if options.rope or options.rope_time:
        rotary_modules(pipe)
        trained_grid(pipe)
    if options.global_path not in (None, "none"):
        check_denoisers(pipe, dict.fromkeys(denoisers_of(pipe), target.method), options.global_path)


def trained_grid(pipe: Any) -> Grid:
    """What rotary scaling goes by: the grid of the model's own size, whatever the native stage's."""
    own = model_defaults(pipe)
    return _grid(pipe, Size(own.height, own.width, own.frames))


def _grid(pipe: Any, size: Size) -> Grid:
    denoiser = next(iter(denoisers_of(pipe).values()))  # those of Wan 2.2 have the same grid
    family = family_of(denoiser)
    assert family is not None
    return family.grid_of_size(denoiser, pipe, size)


def few_steps(pipe: Any, work: Work) -> Work:
    """What a work is warmed up by: the fewest steps in which all its kernels run, one that reuses included.

    Works for which this gives the same, plans aside, are warm together.
    """
    options = dataclasses.replace(work.options, strength=1.0, refresh=min(work.options.refresh, 2))
    least = max(least_steps(pipe), options.refresh)
    method = work.native.method
    if not work.native.is_dense:  # on its usual schedule it might leave these steps dense
        method = dataclasses.replace(method, steps=(0.0, 1.0))

    def few(settings: GenerateSettings, method: Config) -> GenerateSettings:
        return dataclasses.replace(settings, method=method, prompt="a clip", negative="", seed=0, steps=least)

    native, target = few(work.native, method), few(work.target, work.target.method)
    return dataclasses.replace(work, native=native, target=target, options=options)
