"""What sparse attention costs each head: its error at several densities, measured while a clip is made densely.

For head h of a layer, with the rows W[h] (D, C) of the output projection that belong to it,

    error[h, d] = |(O[h, d] − O[h, dense]) W[h]|²  ÷  Σ over heads of |O[h, dense] W[h]|²

summed over tokens: what a density d changes in the layer's output, beside the output itself. It is measured in one step of each
part of the run. All other steps run as they always do, densely, and a run ends with the last step that is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tilewise.kernels.attention.dispatch import choose_backend
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.pipelines.calibration.records import DenoiserProfile, RunProfile, Schedule
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
class Profiled(DynamicMethod):
    """Dense attention that measures what ``base`` would make of its calls, in one step of each part. Not for people's use.

    Of two denoisers that share a run, the second is measured in the middle of what it has of the part in which it begins. The
    first may have had its end by the middle of that part: then it goes by the part before, and in the first part by its first
    step, which is measured for that.

    found: is filled. denoiser, layer: of a call; set by ``prepare`` and ``at``. gram: (H, D, D) of each layer, W[h] W[h]ᵀ.
    """

    base: BlockSelectionMethod
    densities: tuple[float, ...]
    schedule: Schedule
    found: RunProfile
    denoiser: int = 0
    layer: int = 0
    gram: tuple[torch.Tensor | None, ...] = ()

    name: ClassVar[str] = "profiled"

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        layers = attention_layers(denoiser, "denoiser")
        gram = tuple(projection_gram(layer.module, layer.heads) for layer in layers)
        self.found.denoisers.append(DenoiserProfile(Fingerprint.of(denoiser)))
        return dataclasses.replace(self, denoiser=len(self.found.denoisers) - 1, gram=gram)

    def at(self, layer: int, noise: float | None) -> DynamicMethod | None:
        assert noise is not None
        levels, own = self.found.noise, self.found.denoisers[self.denoiser]
        if not levels or levels[-1] != noise:
            self._begin_step(len(levels))
            levels.append(noise)
        step = len(levels) - 1
        if not own.steps or own.steps[-1] != step:
            own.steps.append(step)
        if not self._measures(step) or (self.denoiser, layer) in self.found.measured_now:
            return None  # measured now: the unconditional forward, after the conditional
        return dataclasses.replace(self, layer=layer)

    def _begin_step(self, step: int) -> None:
        """Raises EnoughError where nothing from this step on is measured: the denoisers have all begun, and the last part's
        step is over."""
        begun = [profile.steps[0] for profile in self.found.denoisers if profile.steps]
        waiting = len(begun) < len(self.found.denoisers)
        if step and not waiting and step > self.schedule.measured(self.schedule.count - 1, max(begun)):
            raise EnoughError
        self.found.measured_now.clear()

    def _measures(self, step: int) -> bool:
        """Whether this denoiser is measured in a step."""
        part, begin = self.schedule.part_of(step), self.found.denoisers[self.denoiser].steps[0]
        if part < 0:
            return False
        first = len(self.found.denoisers) > 1 and step == self.schedule.first
        return first or step == self.schedule.measured(part, begin)

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
        profile, step = self.found.denoisers[self.denoiser], len(self.found.noise) - 1
        where = self.schedule.part_of(step), self.layer
        heads, ratio = query.shape[2], query.shape[2] // key.shape[2]
        size = 4 * query[:, :, :ratio].numel()  # of the heads that share a key head, in float32
        at_once = ratio * max(1, min(key.shape[2], AT_ONCE // size))
        shape, gram = (heads, len(self.densities)), self.gram[self.layer]
        errors, shares, output = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0.0
        for first in range(0, heads, at_once):
            own = slice(first, first + at_once)
            shared = slice(first // ratio, (first + at_once) // ratio)
            qkv = query[:, :, own], key[:, :, shared], value[:, :, shared]
            found = head_errors(self.base, self.densities, layout, qkv, scale, None if gram is None else gram[own])
            errors[own], shares[own] = found.errors, found.kept
            output += found.output
        if not (errors.isfinite().all() and output < float("inf")):
            raise OutputError(
                f"calibrate: the attention of layer {self.layer} is not finite in step {step}: the model "
                "makes NaN or infinite activations in this dtype; try another --dtype"
            )
        self.found.measured_now.add((self.denoiser, self.layer))
        profile.errors[where], profile.output[where] = errors, output
        profile.kept[where] = shares * layout.grid.tokens**2
        whole = dataclasses.replace(self.base, density=1.0, recall=None)
        return whole.plan_call(layout, query, key, value, scale, {}, 0)


@dataclass(frozen=True)
class HeadErrors:
    """What densities make of a call, on the CPU.

    errors: (H, densities) float64, squared errors of each head. kept: (H, densities) float64, share of its token pairs that each
    density keeps: whole blocks, and never less than in any case. output: the squared size of the heads' outputs together.
    """

    errors: torch.Tensor
    kept: torch.Tensor
    output: float


def head_errors(
    base: BlockSelectionMethod,
    densities: Sequence[float],
    layout: Layout,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    gram: torch.Tensor | None,
) -> HeadErrors:
    """The errors of each head at some densities, and what these keep.

    qkv: (B, S, H, D) and (B, S, Hk, D), in the layout's order. gram: (H, D, D), W Wᵀ of each head's rows W of the output
    projection; None: identities.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)
    exact = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])  # (B, H, S, D)

    def size(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return (x * (x if gram is None else x @ gram)).sum((0, 2, 3), dtype=torch.float64)

    errors, kept = [], []
    for density in densities:
        if density == 1:
            errors.append(size(torch.zeros_like(exact)))
            kept.append(torch.ones_like(errors[-1]))
            continue
        method = dataclasses.replace(base, density=density, recall=None)
        planned = method.plan_call(layout, *qkv, scale, {}, 0)
        choice = choose_backend(*qkv, planned.plan)
        out = run_planned(qkv, planned, choice, layout, scale)
        errors.append(size(out.transpose(1, 2) - exact))
        assert planned.plan.head_density is not None
        kept.append(planned.plan.head_density.double().mean(0))
    return HeadErrors(torch.stack(errors, -1).cpu(), torch.stack(kept, -1).cpu(), float(size(exact).sum()))


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
    method = Profiled(base, tuple(densities), schedule, found)
    config = Config(method, steps=(0.0, 1.0), vae=False)
    with contextlib.suppress(EnoughError), patched(pipe, config):
        run(pipe, settings, progress, decode=False)
    if not any(profile.errors for profile in found.denoisers):
        raise ConfigError(
            f"calibrate: no attention call of this size can be planned by {base.name}, so there is nothing to calibrate: on a "
            "CPU it takes 1,024 tokens, on a GPU 12,800; make the clip larger, or lower the method's min_tokens"
        )
    return found
