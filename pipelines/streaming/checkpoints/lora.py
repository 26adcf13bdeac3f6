"""A LoRA for a causal checkpoint: read its pairs in any published layout, and add them to the weights.

W' = W + scale · (α / r) · B A, with A of (r, in) and B of (out, r) (arXiv 2106.09685, section 4.1). Where a file names no α,
it is r, as in the published causal ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tilewise.pipelines.errors import ModelError
from tilewise.pipelines.streaming.checkpoints.wan_names import bare_names, module_name

_MATRIX = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.\w+)?\.weight|(.+)\.lora_(A|B|down|up)")
_SIDES = {"A": 0, "down": 0, "B": 1, "up": 1}
_WHOLE = {".diff": "weight", ".diff_b": "bias"}  # differences that are stored in full


@dataclass(frozen=True)
class Change:
    """What is added to one weight. Either a pair (A, B) with its factor α / r, or a whole difference."""

    parts: tuple[torch.Tensor, ...]
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.parts) == 1:
            return tuple(self.parts[0].shape)
        return (self.parts[1].shape[0], self.parts[0].shape[1])

    def added_to(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """The changed weight, computed in float32 on its device, of its dtype."""
        where = weight.device
        parts = [part.to(where, torch.float32) for part in self.parts]
        change = parts[0] if len(parts) == 1 else parts[1] @ parts[0]
        return weight.to(torch.float32).add(change, alpha=scale * self.factor).to(weight.dtype)


def lora_changes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Change]:
    """diffusers' name of a weight → its change. PEFT's names (lora_A, lora_B) and others' (lora_down, lora_up, diff).

    Raises ModelError for a name that is none of these, a matrix without its partner, and ranks that differ.
    """
    pairs: dict[str, list[torch.Tensor | None]] = {}
    alphas: dict[str, float] = {}
    changes: dict[str, Change] = {}
    strange: list[str] = []
    for bare, name in bare_names(tensors).items():
        tensor = tensors[name]
        if match := _MATRIX.fullmatch(bare):
            pairs.setdefault(match[1] or match[3], [None, None])[_SIDES[match[2] or match[4]]] = tensor
        elif bare.endswith(".alpha"):
            alphas[bare.removesuffix(".alpha")] = float(tensor)
        elif suffix := next((s for s in _WHOLE if bare.endswith(s)), None):
            changes[f"{module_name(bare.removesuffix(suffix))}.{_WHOLE[suffix]}"] = Change((tensor,))
        else:
            strange.append(name)
    if strange:
        raise ModelError(
            f"the LoRA holds {len(strange)} weights that are no part of one: {', '.join(strange[:4])}"
            + (", …" if len(strange) > 4 else "")
        )
    for module, (down, up) in pairs.items():
        if down is None or up is None:
            raise ModelError(f"the LoRA has only one of the two matrices of {module}")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ModelError(
                f"the matrices of the LoRA for {module} do not fit each other: A is {tuple(down.shape)}, B is "
                f"{tuple(up.shape)}; A is (rank, in) and B (out, rank)"
            )
        rank = down.shape[0]
        changes[f"{module_name(module)}.weight"] = Change((down, up), alphas.get(module, rank) / rank)
    return changes
