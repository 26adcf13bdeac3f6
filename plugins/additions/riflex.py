"""``riflex``: longer single shots by one slower rotary frequency in time (RIFLEx, arXiv 2502.15894, §4).

The frequency θ_k whose period is about as long as the clips that a model was trained on makes a longer clip begin anew when it
comes round. It alone is slowed, so that it does not within L latent frames:

    θ_k ← min(θ_k, 0.9 · 2π / L)          0.9: the paper's code's margin

All other frequencies, of time and of the frame, stay as they are. Clips no longer than in training are left as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.plugins.additions.base import Addition, Report, register_addition
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.methods.base import Method
from tilewise.plugins.models.common.native_size import native_grid
from tilewise.plugins.models.common.registry import family_of

MARGIN = 0.9
# The number k of the frequency, from 1, that the authors name for a model's rotary module or denoiser; of others, the one whose
# period is nearest to the training length.
PUBLISHED = {"HunyuanVideoRotaryPosEmbed": 4, "HunyuanVideo15RotaryPosEmbed": 4, "CogVideoXTransformer3DModel": 2}
COGVIDEOX = "CogVideoXTransformer3DModel"
COGVIDEOX_AT, COGVIDEOX_BASE = 5, 10_000.0  # of its rotary tables among the forward's arguments, and their base
Tables = tuple[torch.Tensor, torch.Tensor]


def intrinsic(theta: torch.Tensor, native: int) -> int:
    """The place, from 0, of the frequency among ``theta`` (d/2,) whose period is nearest to ``native`` positions."""
    return int((2 * math.pi / theta - native).abs().argmin())


def riflex(theta: torch.Tensor, native: int, length: int, k: int | None = None) -> torch.Tensor:
    """Frequencies (d/2,) of an axis trained on ``native`` positions, for ``length`` of them: one is slower, so that it does not
    turn round within them. k: its number, from 1; None: ``intrinsic``."""
    out = theta.clone()
    at = intrinsic(theta, native) if k is None else k - 1
    out[at] = min(float(theta[at]), MARGIN * 2 * math.pi / length)
    return out


@register_addition
@dataclass(frozen=True)
class Riflex(Addition):
    """RIFLEx in Wan, SkyReels-V2, HunyuanVideo, HunyuanVideo 1.5 and CogVideoX with rotary positions.

    Args:
        native: latent frames that the model was trained on. Default: those of the pipeline's usual clip, filled in when it is
            patched; a bare denoiser needs it.
        k: number of the frequency, from 1, the fastest. Default: 4 for HunyuanVideo and 2 for CogVideoX, as published; for others
            the one whose period is nearest to ``native``.

    Raises:
        ConfigError: for values that cannot be.
    """

    native: int | None = None
    k: int | None = None

    name: ClassVar[str] = "riflex"

    def __post_init__(self) -> None:
        self._whole("native", 1, optional=True)
        self._whole("k", 1, optional=True)

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        if self.native is not None or _kind(denoiser) is None:
            return self
        if target is denoiser or isinstance(target, nn.Module):
            raise ConfigError(
                f"riflex: a bare {type(denoiser).__name__} does not say how long its training clips were: give native=…, in "
                "latent frames, or patch the pipeline"
            )
        return dataclasses.replace(self, native=native_grid(target, denoiser).t)

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        theta = frequencies(denoiser)
        if theta is None:
            raise UnsupportedModelError(
                f"riflex slows a rotary frequency of Wan, SkyReels-V2, HunyuanVideo or CogVideoX (5B, 1.5); {name}, a "
                f"{type(denoiser).__name__}, has none of theirs. Nothing was changed"
            )
        if self.k is not None and self.k > len(theta):
            raise ConfigError(f"riflex: k={self.k}, but {name} has {len(theta)} rotary frequencies in time")

    def put_on(self, state: Any, denoiser: nn.Module, handles: list[Any]) -> Report:
        theta, native = frequencies(denoiser), self.native
        assert theta is not None and native is not None
        published = PUBLISHED.get(_kind(denoiser) or "", len(theta) + 1)
        k = self.k or (published if published <= len(theta) else None)
        longest = [0]

        def changed(tables: Tables, frames: int) -> Tables:
            longest[0] = max(longest[0], frames)
            return tables if frames <= native else slowed(tables, frames, theta, native, k)

        def after(rope: Any, args: tuple, output: Tables) -> Tables:
            patch = rope.patch_size[0] if isinstance(rope.patch_size, tuple) else rope.patch_size_t
            return changed(output, args[0].shape[2] // patch)

        def before(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            family = family_of(model)
            assert family is not None
            frames = family.grid(model, args, kwargs).t
            if len(args) > COGVIDEOX_AT:
                rest = args[COGVIDEOX_AT + 1 :]
                return (*args[:COGVIDEOX_AT], changed(args[COGVIDEOX_AT], frames), *rest), kwargs
            return args, {**kwargs, "image_rotary_emb": changed(kwargs["image_rotary_emb"], frames)}

        model: Any = denoiser
        if _kind(denoiser) == COGVIDEOX:
            handles.append(denoiser.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(model.rope.register_forward_hook(after))

        def report() -> str | None:
            if not longest[0]:
                return None
            used = longest[0] > native and not torch.equal(riflex(theta, native, longest[0], k), theta)
            at = intrinsic(theta, native) + 1 if k is None else k
            return f"riflex: {'slowed' if used else 'left'} frequency {at}: {longest[0]} latent frames, {native} in training"

        return report


def slowed(tables: Tables, frames: int, theta: torch.Tensor, native: int, k: int | None) -> Tables:
    """Rotary tables (…, S, …, D) whose first channels are those of time, in pairs, with RIFLEx's frequency; tokens are in raster
    order, time slowest."""
    new = riflex(theta, native, frames, k)
    (at,) = (new != theta).nonzero().flatten().tolist() or (None,)
    if at is None:
        return tables
    cos, sin = tables
    tokens = cos.numel() // cos.shape[-1]
    position = torch.arange(frames, device=cos.device, dtype=torch.float64).repeat_interleave(tokens // frames)
    angle = (position * float(new[at])).view(*cos.shape[:-1], 1)

    def put(table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[..., 2 * at : 2 * at + 2] = values.to(table.dtype)
        return table

    return put(cos, angle.cos()), put(sin, angle.sin())


def frequencies(denoiser: nn.Module) -> torch.Tensor | None:
    """(d/2,) float64: the rotary frequencies of time; None where a denoiser has none that is known."""
    kind, model = _kind(denoiser), denoiser
    config: Any = model.config if kind is not None else None
    if kind == COGVIDEOX:
        return _powers(COGVIDEOX_BASE, config.attention_head_dim // 4)
    if kind is None:
        return None
    rope: Any = model.rope
    if kind in PUBLISHED:
        return _powers(rope.theta, rope.rope_dim[0])
    first = [table[1, : rope.t_dim : 2].double().cpu() for table in (rope.freqs_sin, rope.freqs_cos)]
    return torch.atan2(*first)  # what position 1 turns by: at most one radian


def _powers(base: float, channels: int) -> torch.Tensor:
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _kind(denoiser: nn.Module) -> str | None:
    """What is served of a denoiser: the class of its rotary module, or its own where it is given tables."""
    if type(denoiser).__name__ == COGVIDEOX:
        config: Any = denoiser.config
        return COGVIDEOX if config.use_rotary_positional_embeddings else None
    rope = getattr(denoiser, "rope", None)
    if type(rope).__name__ in PUBLISHED or all(
        hasattr(rope, name) for name in ("t_dim", "freqs_cos", "freqs_sin", "patch_size")
    ):
        return type(rope).__name__
    return None
