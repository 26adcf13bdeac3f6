"""A denoiser with some of its layers: a layer's kernels, sizes and seconds do not depend on how many there are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

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
