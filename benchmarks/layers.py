"""A denoiser with some of its layers, whose kernels, sizes and seconds do not depend on their number; or with 8-bit ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

STACKS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def stacks_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """A transformer's lists of equal layers by attribute name; none for a UNet."""
    return {name: stack for name in STACKS if isinstance(stack := getattr(model, name, None), nn.ModuleList)}


@contextlib.contextmanager
def shortened(model: nn.Module, length: Callable[[int], int]) -> Iterator[None]:
    """Run a block with the first length(n) of each stack's n layers alone."""
    stacks = stacks_of(model)
    for name, stack in stacks.items():
        setattr(model, name, nn.ModuleList(stack[: length(len(stack))]))
    try:
        yield
    finally:
        for name, stack in stacks.items():
            setattr(model, name, stack)


def first_layers(model: nn.Module, count: int) -> contextlib.AbstractContextManager[None]:
    """`shortened` to so many layers of all together, of each kind its share.

    Raises:
        ValueError: where a share is no whole number of layers.
    """
    stacks = stacks_of(model)
    layers = sum(map(len, stacks.values()))
    if odd := [name for name, stack in stacks.items() if count * len(stack) % layers]:
        raise ValueError(f"{count} of {layers} layers are no whole share of {', '.join(odd)}")
    return shortened(model, lambda length: count * length // layers)


def fewest(model: nn.Module) -> int:
    """The fewest layers that `first_layers` can leave, of each kind at least two where there are two."""
    lengths = [len(stack) for stack in stacks_of(model).values()]
    shared = math.gcd(*lengths)
    return sum(lengths) // shared * min(2, shared)


def fp8_linears(model: Any) -> None:
    """Weights of the blocks' linear layers and, as they come, their inputs in fp8 with a scale a row. A model that has them stays
    as it is."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_  # type: ignore

    linears = [module for module in model.blocks.modules() if isinstance(module, torch.nn.Linear)]
    if type(linears[0].weight) in (torch.nn.Parameter, torch.Tensor):
        quantize_(
            model.blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        )
