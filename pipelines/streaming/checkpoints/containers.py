"""Take the weights out of what a training script saved around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.streaming.checkpoints.wan_names import bare_name

PLAIN, AVERAGED, LORA = "generator", "generator_ema", "generator_lora"
WRAPPED = ("state_dict", "model", "module")  # tried in this order, where there is no generator


@dataclass(frozen=True)
class Contents:
    """Names and tensors as the file has them: of the denoiser, and of a LoRA for it. Either may be empty."""

    weights: Mapping[str, torch.Tensor]
    lora: Mapping[str, torch.Tensor]


def unwrap(read: Mapping[str, Any], *, ema: bool | None = None, prefer_ema: bool = False) -> Contents:
    """The weights in a container.

    ema: True for the averaged weights, False for the others; raises ModelError if those are not there. None for
    those of ``prefer_ema``, or else the ones that are there.
    """
    lora = read.get(LORA)
    held = [name for name in (PLAIN, AVERAGED) if isinstance(read.get(name), Mapping)]
    if held:
        wanted = AVERAGED if (prefer_ema if ema is None else ema) else PLAIN
        if wanted not in held:
            if ema is not None:
                raise ModelError(f"the checkpoint has no {wanted}, only {held[0]}; leave ema out")
            wanted = held[0]
        inner = unwrap(read[wanted])
        return Contents(inner.weights, _tensors(lora) if isinstance(lora, Mapping) else inner.lora)
    if isinstance(lora, Mapping):
        return Contents({}, _tensors(lora))
    for name in WRAPPED:
        if isinstance(read.get(name), Mapping):
            return unwrap(read[name], ema=ema, prefer_ema=prefer_ema)
    if ema:
        raise ModelError(f"the checkpoint has no {AVERAGED}; leave ema out")
    tensors = _tensors(read)
    return Contents({}, tensors) if is_lora(tensors) else Contents(tensors, {})


def is_lora(names: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a LoRA: pairs of matrices, and no whole denoiser."""
    bare = [bare_name(name) for name in names]
    return any(".lora_" in name for name in bare) and not any(
        name.startswith("patch_embedding.weight") for name in bare
    )


def _tensors(read: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Without what else a training script keeps beside the weights: steps, settings."""
    return {str(name): value for name, value in read.items() if isinstance(value, torch.Tensor)}
