"""What a family adapter is: how a group of diffusers denoisers reads its grid and orders its tokens.

A new family is a new file in this folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

import tilewise.plugins.models
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import TilewiseError, UnsupportedModelError


class UnreadableGridError(TilewiseError):
    """The inputs of a forward hold no grid that its family can read, although the model takes them. Raised by ``Family.grid``;
    the forward then runs as if ``SelectiveFamily.refuses`` had said why."""


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer of a denoiser: the module whose ``processor`` is replaced.

    block: number of the transformer block it belongs to, which ``blocks="2:"`` selects by.
    halvings: None: the layer attends over the denoiser's token sequence. A number: over a feature map of its own, whose height
        and width are the grid's, halved that many times (rounded up); its tokens are reordered at each call.
    """

    name: str
    module: nn.Module
    block: int
    heads: int
    head_dim: int
    halvings: int | None = None

    def grid(self, grid: Grid) -> Grid:
        """The layer's own grid in a forward over ``grid``."""
        if self.halvings is None:
            return grid
        return dataclasses.replace(grid, h=-(-grid.h >> self.halvings), w=-(-grid.w >> self.halvings))


@dataclass(frozen=True)
class Size:
    """What a pipeline is asked to make: pixels and frames."""

    height: int
    width: int
    num_frames: int


@dataclass(frozen=True)
class Streams:
    """How a denoiser's blocks are called: what a second path through them has to know (``two_paths``).

    They take ``hidden`` and, with text in the same sequence, ``encoder_hidden_states`` first or by name.

    blocks: attributes with the blocks, in their order. text: position of the text among the forward's arguments.
    joint: picture and text share one attention, and a block returns both; else it has cross-attention to the text.
    text_first: whether it returns the text first.
    own, cross: a block's self-attention, and its cross-attention to the text, where it has one. hidden: its first parameter.
    """

    blocks: tuple[str, ...]
    text: int
    joint: bool = False
    text_first: bool = False
    own: str = "attn1"
    cross: str = "attn2"
    hidden: str = "hidden_states"


class Reorder(Protocol):
    """How an adapter's hooks follow the token order in force, if there is one.

    The hooks are traced by torch.compile, and so must not decide anything by the step: that is decided in here.
    """

    def into(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """``x`` with its token axis ``dim`` brought from the model's own order into the one in force."""

    def back(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """``x`` with its token axis ``dim`` brought from the order in force back into the model's own."""


class FusedState(Protocol):
    """What a family's fused code asks at each call."""

    def fused_here(self, x: torch.Tensor) -> bool:
        """Whether fused kernels may run on hidden states like ``x``: wanted, on a device that has them, no gradients."""


class FusedFamily(Protocol):
    """What a family may offer besides ``Family``: the rest of the step in fused kernels. Both methods are optional."""

    def fuse(self, denoiser: nn.Module, state: FusedState) -> list[Any]:
        """Put fused forwards on a denoiser, exact to rounding, which ask ``state`` at each call whether to run.

        Returns the handles, each with ``remove()``.
        """

    def self_attention(self, layer: AttentionLayer) -> Callable[..., torch.Tensor | None] | None:
        """What can stand in for the stock processor of a layer, or None.

        It is called with the stock processor, a function to call as diffusers' attention dispatcher, and then the
        processor's own arguments. Where it cannot run it returns None, before it called anything.
        """


class SelectiveFamily(Protocol):
    """What a family may offer besides ``Family`` if some of its models, or some calls, cannot run a method at all."""

    def refuses(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why a forward call cannot be sparse, or None. It then runs stock, in the model's own token order, and is counted as
        fallen back; ``strict`` raises. ``grid`` is not asked for then, and hooks must not need what it would have read.
        Traced by torch.compile: it may go by the config and by which arguments are given. What only values tell, ``grid``
        finds, by raising ``UnreadableGridError``; in a compiled denoiser that is an error."""


class GuidedFamily(Protocol):
    """What a family may offer besides ``Family`` if a full path can run beside some of its models."""

    streams: dict[str, Streams]  # by class name


class Family(Protocol):
    """How tilewise reads one group of denoisers. Stateless: one instance serves all of them."""

    name: str
    classes: tuple[str, ...]

    def grid(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Grid:
        """The token grid of a forward call, from its arguments.

        Raises:
            UnreadableGridError: where they hold none, and the model may still run.
        """

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The timestep argument of a forward call: any shape; where tokens differ, the noisiest counts."""

    def layers(self, denoiser: nn.Module) -> list[AttentionLayer]:
        """The self-attention layers over the grid, in order."""

    def reorder_hooks(self, denoiser: nn.Module, reorder: Reorder) -> list[Any]:
        """Register hooks that bring tokens into the order in force before the blocks and back after them.

        Everything that has a token axis must follow: hidden states, rotary tables, per-token timesteps.
        Returns the handles, each with ``remove()``.
        """

    def raster_hooks(self, module: nn.Module, reorder: Reorder) -> list[Any]:
        """Hooks that give one attention module its tokens in the model's own order, and bring its output back.

        For a module whose processor is not ours: it may count on that order.
        """

    def grid_of_size(self, denoiser: nn.Module, pipe: Any, size: Size) -> Grid:
        """The grid that a pipeline call of this size leads to.

        Raises:
            ConfigError: for a size the model does not take as it is, with the nearest one that it does.
        """


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known; a denoiser is recognised by the name of its class or of a base class."""
    for class_name in family.classes:
        _FAMILIES[class_name] = family
    return family


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(tilewise.plugins.models.__path__):
        importlib.import_module(f"tilewise.plugins.models.{module.name}")


def family_of(denoiser: nn.Module) -> Family | None:
    """The family that serves a denoiser, or None."""
    _import_all()
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    return None


def streams_of(denoiser: nn.Module) -> Streams | None:
    """How a second path goes through a denoiser, or None where that is not known."""
    streams: dict[str, Streams] = getattr(family_of(denoiser), "streams", {})
    return streams.get(type(denoiser).__name__)


def served_streams() -> list[str]:
    """Classes of denoisers that a second path goes through."""
    _import_all()
    return list(dict.fromkeys(name for family in _FAMILIES.values() for name in getattr(family, "streams", {})))


def attention_layers(denoiser: nn.Module, name: str = "denoiser") -> list[AttentionLayer]:
    """The self-attention layers of a denoiser that a family serves.

    Args:
        name: the denoiser's, for messages.

    Raises:
        UnsupportedModelError: where its blocks are not those of its class, as in engines that fuse blocks or whole stacks of
            them (nunchaku), or where it has no self-attention at all.
    """
    family = family_of(denoiser)
    assert family is not None
    model = type(denoiser).__name__
    try:
        layers = family.layers(denoiser)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: this {model} does not have the attention modules of its class ({error}); blocks that another library "
            "fused or replaced cannot be patched. Nothing was changed. Load the model with diffusers alone"
        ) from error
    for layer in layers:
        if not hasattr(layer.module, "processor"):
            raise UnsupportedModelError(
                f"{name}.{layer.name} is a {type(layer.module).__name__} without an attention processor: another library put its "
                "own attention there, which cannot be patched. Nothing was changed. Load the model with diffusers alone"
            )
    if not layers:
        raise UnsupportedModelError(
            f"{name}: this {model} has no self-attention layer, so there is nothing to patch; a UNet has them in blocks whose "
            "type has CrossAttn in its name"
        )
    return layers


def family_named(name: str) -> Family:
    """The family of a name in ``supported_models``."""
    _import_all()
    return next(family for family in _FAMILIES.values() if family.name == name)


def supported_models() -> dict[str, list[str]]:
    """Family name → names of the denoiser classes it serves."""
    _import_all()
    found: dict[str, list[str]] = {}
    for class_name, family in _FAMILIES.items():
        found.setdefault(family.name, []).append(class_name)
    return {name: sorted(classes) for name, classes in sorted(found.items())}
