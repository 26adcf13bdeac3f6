"""A low-rank change of every Linear in a denoiser's blocks: W + B·A (LoRA, Hu et al. 2021), alpha = rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

LAYERS = tuple(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
LAYERS += ("ffn.net.0.proj", "ffn.net.2")


class LoraLinear(nn.Module):
    """A frozen Linear and its trained change. The weights are added before the product: for thousands of tokens that is cheaper
    than multiplying twice."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, columns = linear.weight.shape
        where = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, columns).to(where) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=where))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def add_lora(denoiser: nn.Module, rank: int, seed: int) -> None:
    """Freeze the denoiser and put a `LoraLinear` in the place of every Linear of its blocks."""
    denoiser.requires_grad_(False)
    torch.manual_seed(seed)
    for name in _names(denoiser):
        parent, _, last = name.rpartition(".")
        linear = denoiser.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(denoiser.get_submodule(parent), last, LoraLinear(linear, rank))


def lora_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Name → trained matrix, by diffusers' names for a LoRA: `transformer.blocks.0.attn1.to_q.lora_A.weight`."""
    found = {}
    for name in _names(denoiser):
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, LoraLinear)
        found[f"transformer.{name}.lora_A.weight"] = layer.down
        found[f"transformer.{name}.lora_B.weight"] = layer.up
    return found


def load_lora(denoiser: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """`add_lora` with these weights, named as by `lora_parameters`; they say the rank."""
    add_lora(denoiser, next(len(tensor) for name, tensor in tensors.items() if "lora_A" in name), 0)
    with torch.no_grad():
        for name, parameter in lora_parameters(denoiser).items():
            parameter.copy_(tensors[name])


def shrink(tensors: Mapping[str, torch.Tensor], rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """The nearest change of a lower rank, in float16, by each layer's singular values; and the lost share of its square."""
    small, lost, whole = {}, 0.0, 0.0
    for name in tensors:
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        change = tensors[other].double() @ tensors[name].double()
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        root = sizes[:rank].sqrt()
        small[name], small[other] = (root[:, None] * right[:rank]).half(), (left[:, :rank] * root).half()
        lost += float((small[other].double() @ small[name].double() - change).square().sum())
        whole += float(change.square().sum())
    return small, lost / whole


def _names(denoiser: nn.Module) -> Iterator[str]:
    for number in range(len(denoiser.get_submodule("blocks"))):  # type: ignore[arg-type]
        for layer in LAYERS:
            yield f"blocks.{number}.{layer}"
