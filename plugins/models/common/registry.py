"""Which family serves a denoiser: the built-in ones of ``plugins/models/``, and those given to ``register_family``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from tilewise.plugins.errors import UnsupportedModelError
from tilewise.plugins.models.common.family import AttentionLayer, Family, Streams

BUILT_IN = "tilewise.plugins.models"  # each module of this package registers the families in it

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known. A denoiser is recognised by the name of its class or, for a class that is not diffusers', of a base.

    A family registered later for the same class name replaces the earlier one.

    Raises:
        TypeError: if ``family`` is not an instance of a subclass of ``Family``.
    """
    if not isinstance(family, Family):
        given = f"the class {family.__name__}" if isinstance(family, type) else f"a {type(family).__name__}"
        raise TypeError(
            f"register_family takes an instance of a subclass of tilewise.Family, got {given}. Derive your class from "
            "tilewise.Family, which has defaults for all methods that are optional, and pass an instance"
        )
    for class_name in family.classes:
        _FAMILIES[class_name] = family
    return family


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(BUILT_IN).__path__):
        importlib.import_module(f"{BUILT_IN}.{module.name}")


def family_of(denoiser: nn.Module) -> Family | None:
    """The family that serves a denoiser, or None.

    Your subclass of a served class is served as that class is. One of diffusers' own is another model, and has to be listed.
    """
    _import_all()
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
        if cls.__module__.startswith("diffusers."):
            return None
    return None


def streams_of(denoiser: nn.Module) -> Streams | None:
    """How ``two_paths`` runs a second path through a denoiser; None if it cannot."""
    family = family_of(denoiser)
    return None if family is None else family.streams.get(type(denoiser).__name__)


def served_streams() -> list[str]:
    """Class names of the denoisers that ``two_paths`` can run."""
    _import_all()
    return list(dict.fromkeys(name for family in _FAMILIES.values() for name in family.streams))


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
            "type has CrossAttn or Attn in its name"
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
