"""What a method is: a layout of the tokens and a plan over its blocks. A new method is a new file in this folder."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch

import tilewise.plugins.methods
from tilewise.kernels.layout import Grid, Layout
from tilewise.kernels.plan import BlockPlan
from tilewise.plugins.errors import ConfigError, unknown

_REGISTRY: dict[str, type[Method]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class: a frozen dataclass whose fields are the method's options (JSON values only).

    A subclass is decorated with ``@register``, sets ``name`` and gives ``layout`` and ``plan``. Both are pure: the same
    arguments give the same answer, which is why the patch may keep it for all layers and steps.
    """

    name: ClassVar[str]

    def layout(self, grid: Grid) -> Layout | None:
        """Token order for a grid. None: the method leaves every attention call dense."""
        raise NotImplementedError

    def plan(self, layout: Layout, heads: int, device: torch.device) -> BlockPlan:
        """The key blocks that each query block sees, for a layer with ``heads`` heads.

        Raises:
            ConfigError: if the options do not fit this grid or number of heads.
        """
        raise NotImplementedError

    def check(self, heads: int) -> None:
        """Refuse, before anything runs, options that do not fit a layer with ``heads`` heads.

        Raises:
            ConfigError: saying what would fit.
        """

    def describe(self, layout: Layout) -> dict[str, Any]:
        """What ``explain`` says about the method on this layout, beyond grid, tile and density."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}


M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: makes a method known by its name."""
    _REGISTRY[cls.name] = cls
    return cls


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(tilewise.plugins.methods.__path__):
        importlib.import_module(f"tilewise.plugins.methods.{module.name}")


def methods() -> list[str]:
    """Names of all methods."""
    _import_all()
    return sorted(_REGISTRY)


def make_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """A method from its name and options.

    Raises:
        ConfigError: unknown name or option, or a value that cannot be; the message lists what can.
    """
    _import_all()
    if name not in _REGISTRY:
        raise unknown("method", name, _REGISTRY)
    cls = _REGISTRY[name]
    valid = [f.name for f in dataclasses.fields(cls)]
    for option in options or {}:
        if option not in valid:
            raise unknown(f"option of method {name!r}:", option, valid)
    try:
        return cls(**(options or {}))
    except TypeError as error:
        raise ConfigError(f"method {name!r}: {error}") from error
