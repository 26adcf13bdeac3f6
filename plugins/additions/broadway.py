"""``broadway``: temporal attention of motion modules, guided by its own coarse maps and with more energy (arXiv 2410.06241).

In the first steps of a run, temporal attention maps A (F × F, for each place and head) of a UNet's second and later blocks on the
way up are changed in two ways (the paper, also called ByTheWay, §3):

    self-guidance        A ← A + α (A¹ − A)          A¹: of the same layer of the second block, nearest neighbours in space
    motion enhancement   A ← F⁻¹(high · β' + low)    F: Fourier transform over keys; high: frequencies of at least F/2 − τ
                         β' = max(β, √((E − E_low) / E_high))
    then negative values are set to 0 and rows are normalised.

E is the energy Σ_keys A² before both, mean over queries, heads, places and the prompt's samples, and E_low + E_high that after
self-guidance, so that the energy does not fall. The second block itself has the second change alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tilewise.plugins.additions.base import Addition, Report, place_in_run, register_addition
from tilewise.plugins.diffusers_compat import holds_both_prompts, unsplit
from tilewise.plugins.errors import ConfigError, UnsupportedModelError
from tilewise.plugins.hooks.answering_processor import answer_calls
from tilewise.plugins.methods.base import Method
from tilewise.plugins.models.common.registry import family_of
from tilewise.plugins.torch_compat import outside_graphs

REFERENCE = "up_blocks.1."  # the block whose maps guide the later ones


@register_addition
@dataclass(frozen=True)
class BroadWay(Addition):
    """Temporal self-guidance and Fourier motion enhancement. Defaults are the paper's for AnimateDiff.

    Args:
        alpha: share of the second block's map, in [0, 1]. beta: factor of high frequencies, at least 1.
        tau: which frequencies are high: those of at least F/2 − tau, for F frames. Default: all but the mean, 7 at 16 frames.
        steps: share of the run's steps, from the first.

    Raises:
        ConfigError: for values that cannot be; in a forward, for a tau that does not leave the mean out.
    """

    alpha: float = 0.6
    beta: float = 1.5
    tau: int | None = None
    steps: float = 0.2

    name: ClassVar[str] = "broadway"

    def __post_init__(self) -> None:
        self._number("alpha", 0, 1)
        self._number("beta", 1)
        self._whole("tau", 0, optional=True)
        self._number("steps", 0, 1)

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        family = family_of(denoiser)
        names = [] if family is None else [layer.name for layer in family.temporal_layers(denoiser)]
        if not any(one.startswith(REFERENCE) for one in names):
            raise UnsupportedModelError(
                f"broadway changes temporal attention in the second block up of a UNet (AnimateDiff); {name}, a "
                f"{type(denoiser).__name__}, has none there. Nothing was changed"
            )

    def put_on(self, state: Any, denoiser: nn.Module, handles: list[Any]) -> Report:
        return _Running(self, state).put_on(denoiser, handles)

    def enhanced(self, maps: torch.Tensor, coarse: torch.Tensor | None, prompted: slice) -> torch.Tensor:
        """The changed attention maps. maps: (B, P, H, F, F) float32, of P places; coarse: the same of the second block, or None.
        prompted: the samples of the prompt."""
        frames = maps.shape[-1]
        energy = maps[prompted].square().sum(-1).mean()
        if coarse is not None:
            maps = maps + self.alpha * (coarse - maps)
        spectrum = torch.fft.rfft(maps, dim=-1)
        frequency = torch.arange(spectrum.shape[-1], device=maps.device)
        high = frequency >= (1 if self.tau is None else frames / 2 - self.tau)
        # Of the two-sided spectrum all but the mean and, of an even number, the last frequency are there twice.
        twice = torch.where((frequency == 0) | (2 * frequency == frames), 1.0, 2.0)
        power = (spectrum[prompted].abs().square() * twice).mean((0, 1, 2, 3)) / frames
        low_energy, high_energy = (power * ~high).sum(), (power * high).sum()
        needed = ((energy - low_energy).clamp(min=0) / high_energy.clamp(min=1e-12)).sqrt()
        factor = torch.where(high, needed.clamp(min=self.beta), 1.0)
        maps = torch.fft.irfft(spectrum * factor, n=frames, dim=-1).clamp(min=0)
        return maps / maps.sum(-1, keepdim=True)


class _Forward(threading.local):
    """What one forward goes by.

    map: (h, w) of the motion module under way. coarse: by layer of the second block, the maps of its calls, (B, h, w, H, F, F).
    calls: by layer, how many there were.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, active: bool = False, halves: bool = False) -> None:
        self.active, self.halves = active, halves
        self.map = (1, 1)
        self.coarse: dict[str, list[torch.Tensor]] = {}
        self.calls: dict[str, int] = {}


class _Running:
    """The changes of one UNet."""

    def __init__(self, addition: BroadWay, state: Any) -> None:
        self.addition, self.state = addition, state
        self.forward = _Forward()
        self.lock = threading.Lock()
        self.forwards = self.changed = 0

    def put_on(self, unet: nn.Module, handles: list[Any]) -> Report:
        family = family_of(unet)
        assert family is not None

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._begin(module, args, kwargs)

        def end(*_: Any) -> None:
            self.forward.reset()

        def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.forward.map = (hidden.shape[-2], hidden.shape[-1])

        handles.append(unet.register_forward_pre_hook(outside_graphs(begin), with_kwargs=True))
        handles.append(unet.register_forward_hook(outside_graphs(end), always_call=True))
        owners = set()
        for layer in family.temporal_layers(unet):
            if not layer.name.startswith("up_blocks.") or layer.name.startswith("up_blocks.0."):
                continue
            owner = ".".join(layer.name.split(".")[:4])  # up_blocks.1.motion_modules.0
            if owner not in owners:
                owners.add(owner)
                module = unsplit(unet.get_submodule(owner))
                handles.append(module.register_forward_pre_hook(outside_graphs(seen), with_kwargs=True))
            answered = answer_calls(layer.module, outside_graphs(self._answer(layer.name)))
            if answered is None:
                kind = type(layer.module.processor).__name__
                raise UnsupportedModelError(f"broadway: {layer.name} has a {kind}, whose attention cannot be answered")
            handles.append(answered)
        return self.report

    def report(self) -> str | None:
        """For ``summary``."""
        return f"broadway: changed {self.changed} of {self.forwards} forwards" if self.forwards else None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        step, steps = place_in_run(self.state, module, args, kwargs)
        active = step < self.addition.steps * steps
        self.forward.reset(active, holds_both_prompts(self.state.steps.pipeline()))
        with self.lock:
            self.forwards += 1
            self.changed += active

    def _answer(self, name: str) -> Callable[..., torch.Tensor]:
        def answer(
            stock: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **more: Any,
        ) -> torch.Tensor:  # fmt: skip
            plain = attn_mask is None and not dropout_p and not is_causal and query.shape == key.shape
            if not self.forward.active or not plain or query.shape[1] < 2:
                return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
            return self._changed(name, query, key, value, scale)

        return answer

    def _changed(
        self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """The output (N, F, H, D) of a call over N = samples × places sequences of F frames."""
        forward, (h, w), frames = self.forward, self.forward.map, query.shape[1]
        if query.shape[0] % (h * w):
            raise UnsupportedModelError(
                f"broadway: {name} was given {query.shape[0]} sequences for a map of {h}×{w} places; motion modules that run on "
                "a part of the places at a time (split inference of FreeNoise) are not served"
            )
        tau = self.addition.tau
        if tau is not None and 2 * tau + 1 > frames:
            raise ConfigError(
                f"broadway: tau={tau} takes the mean of {frames} frames for a high frequency; give at most {(frames - 1) // 2}"
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.einsum("nqhd,nkhd->nhqk", query.float() * scale, key.float())
        maps = scores.softmax(-1).unflatten(0, (-1, h * w))  # (B, P, H, F, F)
        batch, block, layer = len(maps), ".".join(name.split(".")[:2]) + ".", ".".join(name.split(".")[2:])
        call = forward.calls.get(name, 0)
        forward.calls[name] = call + 1
        coarse = None
        if block == REFERENCE:
            forward.coarse.setdefault(layer, []).append(maps.unflatten(1, (h, w)))
        elif call < len(forward.coarse.get(layer, ())):
            coarse = _in_space(forward.coarse[layer][call], (h, w))
        prompted = slice(batch // 2, None) if forward.halves and batch % 2 == 0 else slice(None)
        maps = self.addition.enhanced(maps, coarse, prompted).flatten(0, 1).to(value.dtype)
        return torch.einsum("nhqk,nkhd->nqhd", maps, value)


def _in_space(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w, H, F, F) at another size, nearest neighbours, as (B, P, H, F, F)."""
    flat = maps.flatten(3).permute(0, 3, 1, 2)
    flat = F.interpolate(flat, size=size, mode="nearest")
    return flat.flatten(2).transpose(1, 2).unflatten(2, maps.shape[3:])
