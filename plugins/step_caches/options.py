"""Which of diffusers' step caches runs beside a method, with its options: ``Config.cache``.

A step cache reuses at one denoising step what blocks or attention computed at an earlier one. The hooks are diffusers' own
(``diffusers.hooks``); each class here stands for one of its configs, whose names and defaults the options have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from tilewise.plugins.errors import ConfigError, unknown
from tilewise.plugins.methods.option_text import NONE, make_named, named_dict, named_text, read_named

DTYPES = ("bfloat16", "float16", "float32")
MOST_RATIOS = 10_000


@dataclass(frozen=True)
class StepCache:
    """Base class: a step cache with its options."""

    name: ClassVar[str]

    @property
    def skips(self) -> str:
        """What does not run where it reuses, for messages."""
        return "blocks"

    def kept(self, layers: int) -> float:
        """How many tensors of the size of the hidden states it keeps for one branch of guidance, in the model's dtype, as far as
        they matter. layers: self-attention layers of the denoiser."""
        raise NotImplementedError

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        """diffusers' config. timestep: gives the timestep of the forward under way, as the scheduler counts."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``step_cache`` reads it."""
        return named_dict(self)

    def __str__(self) -> str:
        """The text that ``step_cache`` reads: the name, and the options that are not their defaults."""
        return named_text(self)

    def _number(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or value == math.inf
        ):
            bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"cache {self.name}: {name} must be a number {bounds}, got {value!r}")

    def _whole(self, name: str, least: int, most: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise ConfigError(f"cache {self.name}: {name} must be a whole number {bounds}, got {value!r}")

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ConfigError(f"cache {self.name}: {name} must be true or false, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class FirstBlock(StepCache):
    """First Block Cache (ParaAttention, after TeaCache, arXiv 2411.19108): where the first block's residual changed less than
    ``threshold`` (relative mean) since the last step that was computed, the other blocks' joint residual is reused."""

    name: ClassVar[str] = "first-block"
    threshold: float = 0.05

    def __post_init__(self) -> None:
        self._number("threshold", 0)

    def kept(self, layers: int) -> float:
        return 3  # the first block's output and residual, the residual of the rest

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        from diffusers.hooks import FirstBlockCacheConfig

        return FirstBlockCacheConfig(**dataclasses.asdict(self))


@dataclass(frozen=True)
class TaylorSeer(StepCache):
    """TaylorSeer (arXiv 2503.06923): between steps that are computed, every ``cache_interval``, outputs are extrapolated.

    use_lite_mode: extrapolate the model's output and skip all blocks; otherwise extrapolate the attention layers' outputs.
    """

    name: ClassVar[str] = "taylor"
    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1
    taylor_factors_dtype: str = "bfloat16"
    use_lite_mode: bool = False

    @property
    def skips(self) -> str:
        return "blocks" if self.use_lite_mode else "attention layers"

    def __post_init__(self) -> None:
        self._whole("cache_interval", 1)
        self._whole("disable_cache_before_step", 1)
        self._whole("disable_cache_after_step", 0, optional=True)
        self._whole("max_order", 0, 8)
        self._flag("use_lite_mode")
        if self.taylor_factors_dtype not in DTYPES:
            raise unknown("taylor_factors_dtype", self.taylor_factors_dtype, DTYPES)

    def kept(self, layers: int) -> float:
        return 0 if self.use_lite_mode else layers * (self.max_order + 1)

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        import torch
        from diffusers.hooks import TaylorSeerCacheConfig

        dtype = getattr(torch, self.taylor_factors_dtype)
        return TaylorSeerCacheConfig(**{**dataclasses.asdict(self), "taylor_factors_dtype": dtype})


@dataclass(frozen=True)
class MagCache(StepCache):
    """MagCache (arXiv 2506.09045): skips all blocks while the error that ``mag_ratios`` predict stays below ``threshold``.

    mag_ratios: of a model's residuals from step to step, interpolated to the run's steps. None: diffusers' own for Flux; other
        models have none, and are measured with ``calibrate``. calibrate: compute everything and note the ratios, which
        ``summary`` shows. num_inference_steps: None: those of the pipeline's run; a denoiser without a pipeline needs them.
    """

    name: ClassVar[str] = "mag"
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    mag_ratios: tuple[float, ...] | None = None
    calibrate: bool = False
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        self._number("threshold", 0)
        self._whole("max_skip_steps", 1)
        self._number("retention_ratio", 0, 1)
        self._flag("calibrate")
        self._whole("num_inference_steps", 1, optional=True)
        if self.mag_ratios is None:
            return
        found = self.mag_ratios
        numbers = isinstance(found, list | tuple) and all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 10**6 for n in found
        )
        if not numbers or not 1 <= len(found) <= MOST_RATIOS:
            raise ConfigError(f"cache mag: mag_ratios must be a list of positive numbers, got {str(found)[:80]}")
        if self.calibrate:
            raise ConfigError("cache mag: calibrate measures mag_ratios: give one of them")
        object.__setattr__(self, "mag_ratios", tuple(float(n) for n in found))

    def kept(self, layers: int) -> float:
        return 2  # what went into the first block, the residual of all

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        return self.for_steps(self.num_inference_steps or 1)

    def for_steps(self, steps: int) -> Any:
        """diffusers' config for a run of so many steps."""
        from diffusers.hooks import MagCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        ratios = None if self.calibrate else FLUX_MAG_RATIOS.tolist() if self.mag_ratios is None else self.mag_ratios
        given = {**dataclasses.asdict(self), "mag_ratios": None if ratios is None else list(ratios)}
        # While it measures, one step more than there are: after the last, diffusers' hook prints the ratios and drops them.
        return MagCacheConfig(**{**given, "num_inference_steps": steps + self.calibrate})


@dataclass(frozen=True)
class SeaCache(StepCache):
    """SeaCache (arXiv 2602.18993): reuses the blocks' residual while the filtered latents change little."""

    name: ClassVar[str] = "sea"
    threshold: float = 0.25
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0

    def __post_init__(self) -> None:
        self._number("threshold", 0)
        self._whole("residual_order", 0, 1)
        for name in ("retention_steps", "cache_end_steps", "max_consecutive_cached"):
            self._whole(name, 0)
        self._number("power_exp", 1e-6)

    def kept(self, layers: int) -> float:
        return self.residual_order + 1

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        from diffusers.hooks import SeaCacheConfig

        return SeaCacheConfig(**dataclasses.asdict(self))


@dataclass(frozen=True)
class PyramidAttention(StepCache):
    """Pyramid Attention Broadcast (arXiv 2408.12588): an attention layer's output is reused ``…_block_skip_range`` − 1 times
    after each time that it is computed, at timesteps within ``…_timestep_skip_range`` (of 1000). None: these layers always run.
    """

    name: ClassVar[str] = "pab"
    spatial_attention_block_skip_range: int | None = 2
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    cross_attention_timestep_skip_range: tuple[int, int] = (100, 800)

    @property
    def skips(self) -> str:
        return "attention layers"

    def __post_init__(self) -> None:
        kinds = ("spatial", "temporal", "cross")
        for kind in kinds:
            self._whole(f"{kind}_attention_block_skip_range", 1, optional=True)
            name = f"{kind}_attention_timestep_skip_range"
            found = getattr(self, name)
            whole = isinstance(found, list | tuple) and all(
                isinstance(n, int) and not isinstance(n, bool) for n in found
            )
            if not whole or len(found) != 2 or not 0 <= found[0] <= found[1]:
                raise ConfigError(f"cache pab: {name} must be two timesteps such as 100,800, got {found!r}")
            object.__setattr__(self, name, tuple(found))
        if all(getattr(self, f"{kind}_attention_block_skip_range") is None for kind in kinds):
            raise ConfigError(
                "cache pab: give at least one …_attention_block_skip_range, such as spatial_attention_…=2"
            )

    def kept(self, layers: int) -> float:
        spatial, cross = self.spatial_attention_block_skip_range, self.cross_attention_block_skip_range
        return layers * ((spatial is not None) + (cross is not None))

    def to_diffusers(self, timestep: Callable[[], float]) -> Any:
        from diffusers.hooks import PyramidAttentionBroadcastConfig

        callback: Any = timestep
        return PyramidAttentionBroadcastConfig(**dataclasses.asdict(self), current_timestep_callback=callback)


CACHES: Mapping[str, type[StepCache]] = {
    cls.name: cls for cls in (FirstBlock, TaylorSeer, MagCache, SeaCache, PyramidAttention)
}
CacheLike: TypeAlias = str | Mapping[str, Any] | StepCache


def step_cache(value: Any) -> StepCache | None:
    """A step cache from a name, ``"name:option=value:option=value"``, an object with ``name`` and options (or its JSON text), or
    a step cache; None and "none" stand for no cache.

    Raises:
        ConfigError: unknown name or option, with those that there are, or a value that cannot be.
    """
    if value is None or isinstance(value, StepCache):
        return value
    if isinstance(value, str):
        if value.strip().lower() in (NONE, "null", ""):
            return None
        value = read_named("cache", value, str(FirstBlock(0.1)))
    found: StepCache = make_named("cache", value, CACHES)
    return found
