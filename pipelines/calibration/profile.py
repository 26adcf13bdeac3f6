"""What sparse attention costs each head: its error at several densities, measured while a clip is made densely.

For head h of a layer, with the rows W[h] (D, C) of the output projection that belong to it,

    error[h, d] = |(O[h, d] − O[h, dense]) W[h]|²  ÷  Σ over heads of |O[h, dense] W[h]|²

summed over tokens: what a density d changes in the layer's output, beside the output itself. It is measured in one step of each
part of the run. All other steps run as they always do, densely, and a run ends with the last step that is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.pipelines.errors import OutputError
from tilewise.pipelines.generation.generate import Progress, run
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.plugins.config import Config
from tilewise.plugins.context_parallel.checks import refuse_split
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Planned
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod
from tilewise.plugins.methods.dynamic.sampled_errors import projection_gram
from tilewise.plugins.models.common.fingerprint import Fingerprint
from tilewise.plugins.models.common.registry import attention_layers
from tilewise.plugins.patching import denoisers_of, patched
from tilewise.plugins.runtime.sparse_call import run_planned

AT_ONCE = 256 * 2**20  # bytes of float32 queries whose heads are measured together


class EnoughError(Exception):
    """The last step that is measured has run."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, and the parts that they are divided into.

    steps: of a run. first: the first that is sparse. count: of parts, of equal length within one step, from there to the end.

    Raises:
        ConfigError: more parts than steps.
    """

    steps: int
    first: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.steps - self.first:
            raise ConfigError(
                f"calibrate: {self.steps - self.first} sparse steps of {self.steps} cannot be divided into {self.count} parts; "
                "give fewer parts or more steps"
            )

    @property
    def borders(self) -> tuple[int, ...]:
        """The first step of each part, and the end of the last."""
        return tuple(self.first + part * (self.steps - self.first) // self.count for part in range(self.count + 1))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each part."""
        return tuple(end - start for start, end in itertools.pairwise(self.borders))

    @property
    def middles(self) -> tuple[int, ...]:
        """The step of each part that is measured."""
        return tuple((start + end - 1) // 2 for start, end in itertools.pairwise(self.borders))


@dataclass
class DenoiserProfile:
    """What was measured of one denoiser.

    errors: {(part of the run, layer): (heads, densities)}, summed over forwards, not yet divided by ``output``.
    output: {(part, layer): Σ |O W|²}. pairs: {(part, layer): token pairs of a call}.
    """

    denoiser: Fingerprint
    errors: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    output: dict[tuple[int, int], float] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        calls = [
            [*where, errors.tolist(), self.output[where], self.pairs[where]] for where, errors in self.errors.items()
        ]
        return {"denoiser": dataclasses.asdict(self.denoiser), "calls": calls}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        profile = cls(Fingerprint.from_dict(data["denoiser"]))
        for part, layer, errors, output, pairs in data["calls"]:
            where = part, layer
            profile.errors[where] = torch.tensor(errors, dtype=torch.float64)
            profile.output[where], profile.pairs[where] = output, pairs
        return profile


@dataclass
class RunProfile:
    """What one run told. noise: levels of its steps, in their order, as far as it went."""

    noise: list[float] = field(default_factory=list)
    denoisers: list[DenoiserProfile] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        return {"noise": self.noise, "denoisers": [profile.to_dict() for profile in self.denoisers]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        return cls(list(data["noise"]), [DenoiserProfile.from_dict(found) for found in data["denoisers"]])


@dataclass(frozen=True)
class Profiled(DynamicMethod):
    """Dense attention that measures what ``base`` would make of its calls, at the steps ``measured``. Not for people's use.

    found: is filled. part, layer, denoiser: of a call; set by ``prepare`` and ``at``. gram: (H, D, D) of each layer, W[h] W[h]ᵀ.
    """

    base: BlockSelectionMethod
    densities: tuple[float, ...]
    measured: tuple[int, ...]
    found: RunProfile
    denoiser: int = 0
    layer: int = 0
    part: int = 0
    gram: tuple[torch.Tensor | None, ...] = ()

    name: ClassVar[str] = "profiled"

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        layers = attention_layers(denoiser, "denoiser")
        gram = tuple(projection_gram(layer.module, layer.heads) for layer in layers)
        self.found.denoisers.append(DenoiserProfile(Fingerprint.of(denoiser)))
        return dataclasses.replace(self, denoiser=len(self.found.denoisers) - 1, gram=gram)

    def at(self, layer: int, noise: float | None) -> DynamicMethod | None:
        assert noise is not None
        levels = self.found.noise
        if not levels or levels[-1] != noise:
            if len(levels) > self.measured[-1]:
                raise EnoughError
            levels.append(noise)
        step = len(levels) - 1
        if step not in self.measured:
            return None
        part = self.measured.index(step)
        if (part, layer) in self.found.denoisers[self.denoiser].errors:
            return None  # the unconditional forward, after the conditional
        return dataclasses.replace(self, layer=layer, part=part)

    @property
    def needs_noise(self) -> bool:
        return True

    def layout(self, grid: Grid) -> Layout:
        return self.base.layout(grid)

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        return self.base.scale(layout, head_dim)

    def refuses_call(self, layout: Layout) -> str | None:
        return self.base.refuses_call(layout)

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        return self.base.stays_dense(tokens, device)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "base": self.base.to_dict()}

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        """Measures, some heads at a time, and answers the call densely."""
        profile, where = self.found.denoisers[self.denoiser], (self.part, self.layer)
        heads, ratio = query.shape[2], query.shape[2] // key.shape[2]
        size = 4 * query[:, :, :ratio].numel()  # of the heads that share a key head, in float32
        at_once = ratio * max(1, min(key.shape[2], AT_ONCE // size))
        errors, output, gram = torch.zeros(heads, len(self.densities), dtype=torch.float64), 0.0, self.gram[self.layer]
        for first in range(0, heads, at_once):
            own = slice(first, first + at_once)
            shared = slice(first // ratio, (first + at_once) // ratio)
            qkv = query[:, :, own], key[:, :, shared], value[:, :, shared]
            found, exact = head_errors(
                self.base, self.densities, layout, qkv, scale, None if gram is None else gram[own]
            )
            errors[own] = found
            output += exact
        if not (errors.isfinite().all() and output < float("inf")):
            raise OutputError(
                f"calibrate: the attention of layer {self.layer} is not finite in step {len(self.found.noise) - 1}: the model "
                "makes NaN or infinite activations in this dtype; try another --dtype"
            )
        profile.errors[where], profile.output[where] = errors, output
        profile.pairs[where] = layout.grid.tokens**2
        whole = dataclasses.replace(self.base, density=1.0, recall=None)
        return whole.plan_call(layout, query, key, value, scale, {}, 0)


def head_errors(
    base: BlockSelectionMethod,
    densities: Sequence[float],
    layout: Layout,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    gram: torch.Tensor | None,
) -> tuple[torch.Tensor, float]:
    """(H, densities) float64 squared errors of each head, on the CPU, and the squared size of their outputs together.

    qkv: (B, S, H, D) and (B, S, Hk, D), in the layout's order. gram: (H, D, D), W Wᵀ of each head's rows W of the output
    projection; None: identities.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)
    exact = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])  # (B, H, S, D)

    def size(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return (x * (x if gram is None else x @ gram)).sum((0, 2, 3), dtype=torch.float64)

    found = []
    for density in densities:
        if density == 1:
            found.append(size(torch.zeros_like(exact)))
            continue
        method = dataclasses.replace(base, density=density, recall=None)
        planned = method.plan_call(layout, *qkv, scale, {}, 0)
        choice = choose_backend(*qkv, planned.plan)
        out = run_planned(qkv, planned, choice, layout, scale)
        found.append(size(out.transpose(1, 2) - exact))
    return torch.stack(found, -1).cpu(), float(size(exact).sum())


def profile_run(
    pipe: Any,
    settings: GenerateSettings,
    base: BlockSelectionMethod,
    densities: Sequence[float],
    schedule: Schedule,
    progress: Progress | None = None,
) -> RunProfile:
    """Makes a clip densely, up to the last step that is measured, and says what sparse attention would have cost.

    Raises:
        ConfigError: no attention call that the method could plan.
        OutputError: activations that are not finite.
    """
    refuse_split(
        "calibrate", denoisers_of(pipe), "a process has some heads of each layer, or some of the forwards", halves=True
    )
    found = RunProfile()
    method = Profiled(base, tuple(densities), schedule.middles, found)
    config = Config(method, steps=(0.0, 1.0), vae=False)
    with contextlib.suppress(EnoughError), patched(pipe, config):
        run(pipe, settings, progress, decode=False)
    if not any(profile.errors for profile in found.denoisers):
        raise ConfigError(
            f"calibrate: no attention call of this size can be planned by {base.name}, so there is nothing to calibrate: on a "
            "CPU it takes 1,024 tokens, on a GPU 12,800; make the clip larger, or lower the method's min_tokens"
        )
    return found
