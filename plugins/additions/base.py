"""What a patch puts on a denoiser beside its attention method: ``Config.add``. A new addition is a new file in this folder.

An addition is a frozen dataclass whose fields are its options (JSON values only), decorated with ``@register_addition``. It puts
hooks on the denoiser's modules, and ``unpatch`` takes them off again. Several may be on at once.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar

from torch import nn

import tilewise.plugins.additions
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import Method
from tilewise.plugins.methods.option_text import NONE, make_named, named_dict, named_text, read_named
from tilewise.plugins.models.common.registry import family_of

if TYPE_CHECKING:
    from tilewise.plugins.runtime.forward_state import ForwardState

_REGISTRY: dict[str, type[Addition]] = {}
_PLUS = re.compile(r"\s*\+\s*(?=[A-Za-z{])")  # not that of a number such as 1e+5
EXAMPLE = "broadway:alpha=0.6"
Report: TypeAlias = Callable[[], str | None]
"""Says what an addition did since it was put on, in one line for ``summary``; None where there is nothing to say."""


@dataclass(frozen=True)
class Addition:
    """Base class of additions.

    Whatever ``put_on`` registers must be a hook of PyTorch or a ``ForwardOverride``, made of functions that hold no object by
    ``self``: so that a copy of the denoiser can be made without them. Hooks that go by the denoising step are not for
    torch.compile's tracer: decorate them with ``outside_graphs``.
    """

    name: ClassVar[str]
    forwards: ClassVar[int] = 1
    """How many forwards a call of the denoiser runs."""

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The addition with what it needs to know about a denoiser filled in. Default: as it is.

        Called for each denoiser when ``target``, a pipeline or the denoiser itself, is patched or explained.

        Raises:
            ConfigError: if the denoiser does not say what the addition needs.
        """
        return self

    def check(self, name: str, denoiser: nn.Module, method: Method, beside: Sequence[str]) -> None:
        """Refuse, before anything is changed, a denoiser or a method that this cannot run with.

        name: the denoiser's, for messages. beside: names of the other additions and of the step cache.

        Raises:
            UnsupportedModelError: for the denoiser.
            ConfigError: for the method, or for what is beside it.
        """

    def put_on(self, state: ForwardState, denoiser: nn.Module, handles: list[Any]) -> Report:
        """Change the denoiser. Each change is appended to ``handles`` as soon as it is made, with ``remove()``.

        state: of the patch, whose own hook before a forward has run when those of an addition do.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``additions`` reads it."""
        return named_dict(self)

    def __str__(self) -> str:
        """The text that ``additions`` reads."""
        return named_text(self)

    def _number(self, name: str, low: float, high: float = math.inf, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not good or math.isinf(value):
            bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"{self.name}: {name} must be a number {bounds}, got {value!r}")

    def _whole(self, name: str, least: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{self.name}: {name} must be a whole number of at least {least}, got {value!r}")


def place_in_run(state: ForwardState, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(step, steps) of the forward that has begun, counted within its run: image-to-image begins part-way."""
    family = family_of(denoiser)
    assert family is not None
    at = state.steps.of(family.timestep(args, kwargs))
    return at.step - at.first, at.steps


A = TypeVar("A", bound=type[Addition])
AddLike: TypeAlias = str | Mapping[str, Any] | Addition | Sequence["str | Mapping[str, Any] | Addition"]


def register_addition(cls: A) -> A:
    """Class decorator: makes an addition known by its name."""
    _REGISTRY[cls.name] = cls
    return cls


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(tilewise.plugins.additions.__path__):
        importlib.import_module(f"tilewise.plugins.additions.{module.name}")


def all_additions() -> dict[str, type[Addition]]:
    """Every addition by its name."""
    _import_all()
    return dict(sorted(_REGISTRY.items()))


def additions(value: Any) -> tuple[Addition, ...]:
    """Additions from "name", "name:option=value", several of these joined by " + ", an object with ``name`` and options, an
    addition, or a list of them; None and "none" stand for none.

    Raises:
        ConfigError: unknown name or option, with those that there are, a value that cannot be, or one that is named twice.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in (NONE, "null", "")):
        return ()
    items = _PLUS.split(value) if isinstance(value, str) else value
    if isinstance(items, Mapping | Addition):
        items = [items]
    if not isinstance(items, Sequence):
        raise ConfigError(f"add must be a name, an object with name and options, or a list of them, got {value!r}")
    found: list[Addition] = []
    for item in items:
        given = read_named("add", item, EXAMPLE) if isinstance(item, str) else item
        found.append(given if isinstance(given, Addition) else make_named("add", given, all_additions()))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"add: {name} is given twice")
    return tuple(found)


def additions_text(found: Sequence[Addition]) -> str:
    """The text that ``additions`` reads as these."""
    return " + ".join(map(str, found)) if found else NONE
