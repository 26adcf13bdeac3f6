"""Whether a denoiser is the one that something was measured on: by its class, its attention layers, and a few of its weights.

Weights are compared by the mean magnitude of parameters of one dimension (norms and biases), which quantisation leaves alone, and
to within TOLERANCE, so that dtypes and offloading do not matter. Parameters that have another name here, or no values yet, are
not compared: a LoRA that was not fused leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from tilewise.plugins.errors import ConfigError
from tilewise.plugins.models.common.registry import family_of

SAMPLES = 16  # parameters that are compared
TOLERANCE = 0.02  # relative; bfloat16 has 8 significant bits
FEWEST = 16  # numbers of a parameter: the mean of fewer says little


@dataclass(frozen=True)
class Fingerprint:
    """What a denoiser is recognised by.

    model: its class. heads: of each self-attention layer. weights: (name, mean magnitude) of some parameters.
    """

    model: str
    heads: tuple[int, ...]
    weights: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, denoiser: nn.Module) -> Self:
        family = family_of(denoiser)
        layers = [] if family is None else family.layers(denoiser)
        named = [
            (name, parameter)
            for name, parameter in _parameters(denoiser).items()
            if parameter.ndim == 1 and parameter.numel() >= FEWEST and _has_values(parameter)
        ]
        chosen = [named[i * len(named) // SAMPLES] for i in range(SAMPLES)] if len(named) > SAMPLES else named
        weights = tuple((name, _magnitude(parameter)) for name, parameter in chosen)
        return cls(type(denoiser).__name__, tuple(layer.heads for layer in layers), weights)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Raises ConfigError where ``data`` is not what ``dataclasses.asdict`` made of one."""
        try:
            heads = tuple(int(n) for n in data["heads"])
            weights = tuple((str(name), float(value)) for name, value in data["weights"])
            return cls(str(data["model"]), heads, weights)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the fingerprint of a denoiser: {error!r}") from error

    def differs(self, denoiser: nn.Module) -> str | None:
        """Why ``denoiser`` is another, or None."""
        model = type(denoiser).__name__
        if model != self.model:
            return f"it is a {model}, not a {self.model}"
        family = family_of(denoiser)
        heads = tuple(layer.heads for layer in family.layers(denoiser)) if family is not None else ()
        if heads != self.heads:
            return f"its {_shape(heads)}, not {_shape(self.heads)}"
        parameters = _parameters(denoiser)
        for name, wanted in self.weights:
            there = parameters.get(name)
            if there is None or there.ndim != 1 or not _has_values(there):
                continue
            found = _magnitude(there)
            if abs(found - wanted) > TOLERANCE * max(abs(wanted), abs(found), 1e-6):
                return f"its weights are others: {name} has the mean magnitude {found:.4g}, not {wanted:.4g}"
        return None


def _parameters(denoiser: nn.Module) -> Mapping[str, torch.Tensor]:
    """By name; a layer that PEFT has wrapped keeps the name that it had."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in denoiser.named_parameters()}


def _has_values(parameter: torch.Tensor) -> bool:
    return parameter.device.type != "meta" and parameter.is_floating_point()


def _magnitude(parameter: torch.Tensor) -> float:
    return float(parameter.detach().float().abs().mean())


def _shape(heads: tuple[int, ...]) -> str:
    different = sorted(set(heads))
    return f"{len(heads)} attention layers have {' or '.join(map(str, different)) or 'no'} heads"
