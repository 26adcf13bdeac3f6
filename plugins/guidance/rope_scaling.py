"""Rotary position embedding past the native range: other frequencies for an axis that is longer than in training.

An axis of d channels turns by θ_j per position, j = 0 … d/2 − 1. On an axis that is s times as long as in training:

    NTK     θ_j · s^(−2j / (d − 2))        the fastest as it was, the slowest slowed by s       (arXiv 2309.00071, §3.1)
    YaRN    θ_j · ((1 − γ_j) / s + γ_j)    γ 0 … 1 as the axis holds 1 … 32 turns of j          (arXiv 2309.00071, §3.2)
    RIFLEx  θ_k = 0.9 · 2π / length        k: the frequency with the axis's training length for a period, so that a longer
                                           clip does not begin anew                             (arXiv 2502.15894, §4)

Unchanged by default everywhere. A hook on the denoiser's rotary module makes the tables anew for the grid at hand; axes no longer
than in training are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.additions.riflex import riflex
from tilewise.plugins.errors import ConfigError, UnsupportedModelError, unknown
from tilewise.plugins.patching import denoisers_of

TURNS = (1.0, 32.0)  # YaRN's α and β: fewer turns over the training length than α: slowed by s; more than β: kept


def ntk(theta: torch.Tensor, native: int, length: int) -> torch.Tensor:
    """Frequencies (d/2,) of an axis trained on ``native`` positions, for ``length`` of them."""
    steps = torch.arange(len(theta), dtype=theta.dtype)
    return theta * (length / native) ** (-steps / max(len(theta) - 1, 1))


def yarn(theta: torch.Tensor, native: int, length: int) -> torch.Tensor:
    """The same by YaRN's ramp; its attention temperature is not part of it (the inward window has one)."""
    turns = native * theta / (2 * math.pi)
    keep = ((turns - TURNS[0]) / (TURNS[1] - TURNS[0])).clamp(0, 1)
    return theta * ((1 - keep) * native / length + keep)


SPATIAL: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {"ntk": ntk, "yarn": yarn}
TEMPORAL: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {"riflex": riflex, **SPATIAL}


def rotary_modules(target: Any) -> list[nn.Module]:
    """What makes the rotary tables of a pipeline's denoisers, one each.

    Raises:
        UnsupportedModelError: for a denoiser whose rotary module is not Wan's.
    """
    found = []
    for name, denoiser in denoisers_of(target).items():
        rope: Any = getattr(denoiser, "rope", None)
        if not isinstance(rope, nn.Module) or not all(
            hasattr(rope, a) for a in ("t_dim", "h_dim", "w_dim", "freqs_cos", "freqs_sin", "patch_size")
        ):
            raise UnsupportedModelError(
                f"RoPE scaling: the rotary module of {name} ({type(denoiser).__name__}) is not Wan's; leave it unchanged"
            )
        found.append(rope)
    return found


@contextmanager
def scaled_rope(
    target: Any, native: Grid, *, spatial: str | None = None, temporal: str | None = None
) -> Iterator[None]:
    """Run a block with other rotary frequencies on axes that are longer than ``native``'s.

    Args:
        target: a pipeline or denoiser, patched or not.
        native: the token grid that the model was trained on.
        spatial: "ntk" or "yarn", for height and width. temporal: "riflex", "ntk" or "yarn". None: unchanged.

    Raises:
        ConfigError: for another name.
        UnsupportedModelError: for a denoiser whose rotary module is not Wan's.
    """
    for name, valid in ((spatial, SPATIAL), (temporal, TEMPORAL)):
        if name is not None and name not in valid:
            raise unknown("RoPE scaling", name, valid)
    rules = (TEMPORAL.get(temporal or ""), SPATIAL.get(spatial or ""), SPATIAL.get(spatial or ""))
    handles: list[Any] = []
    try:
        if any(rules):
            hook = _hook(native, rules)
            handles = [rope.register_forward_hook(hook) for rope in rotary_modules(target)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(native: Grid, rules: tuple) -> Callable[..., Any]:
    made: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def scale(rope: Any, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        lengths = tuple(n // p for n, p in zip(args[0].shape[2:], rope.patch_size, strict=True))
        if math.prod(lengths) != output[0].shape[1]:
            raise ConfigError(f"RoPE scaling: tables {tuple(output[0].shape)} are not those of the grid {lengths}")
        key = (*lengths, output[0].device, output[0].dtype)
        found = made.get(key)
        if found is None:
            made.clear()
            angle = _angles(rope, native.shape, lengths, rules).to(output[0].device)
            found = made[key] = angle.cos().to(output[0].dtype), angle.sin().to(output[1].dtype)
        return found

    return scale


def _angles(rope: Any, native: tuple[int, ...], lengths: tuple[int, ...], rules: tuple) -> torch.Tensor:
    """(1, S, 1, D) float64: by how much each pair of channels of each token turns; both channels of a pair have it."""
    dims = (rope.t_dim, rope.h_dim, rope.w_dim)
    # What position 1 turns by is the frequency: at most one radian.
    first = [x[1].double().cpu() for x in (rope.freqs_sin, rope.freqs_cos)]
    theta = torch.atan2(*first).split(dims)
    parts = []
    for axis, (length, rule) in enumerate(zip(lengths, rules, strict=True)):
        frequencies = theta[axis][0::2]
        if rule is not None and length > native[axis]:
            frequencies = rule(frequencies, native[axis], length)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.repeat_interleave(2)
        shape = [1, 1, 1, dims[axis]]
        shape[axis] = length
        parts.append(angle.view(shape).expand(*lengths, dims[axis]))
    return torch.cat(parts, -1).reshape(1, math.prod(lengths), 1, -1)
