"""``calibrated``: a density for each head, layer and noise level, as ``tilewise calibrate`` measured and chose them.

Heads differ: some attend to everything, some to almost nothing, and they do so at some noise levels more than at others. At equal
kept pairs, a plan that gives each head what it needs is closer to dense attention than one density for all.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.window_keys import WindowKeys
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Planned, make_method, register
from tilewise.plugins.methods.dynamic.always_keep import kept_by_rows
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod
from tilewise.plugins.methods.dynamic.map_method import density_of_rows
from tilewise.plugins.models.common.fingerprint import Fingerprint

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # what a head's density is written as: its number among the densities


@dataclass(frozen=True)
class HeadTable:
    """The densities of one denoiser's heads.

    denoiser: what it was measured on. heads: for each noise level, from the lowest, and each layer, a digit for each head
    (DIGITS): the number of its density.
    """

    denoiser: Fingerprint
    heads: tuple[tuple[str, ...], ...]

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        if not isinstance(data, Mapping) or set(data) != {"denoiser", "heads"}:
            raise ConfigError(f"calibrated: a table has the keys 'denoiser' and 'heads', got {reprlib.repr(data)}")
        levels = data["heads"]
        if not _is_list(levels) or not all(_is_list(level) and all(map(_is_text, level)) for level in levels):
            raise ConfigError(
                f"calibrated: the heads of a table are lists of text, one for each noise level, got {reprlib.repr(levels)}"
            )
        return cls(Fingerprint.from_dict(data["denoiser"]), tuple(map(tuple, levels)))


@register
@dataclass(frozen=True)
class Calibrated(DynamicMethod):
    """A method with a density for each head, layer and noise level. Its options are made by ``tilewise calibrate``.

    Args:
        base: the method that selects at each call (``Draft``, ``XAttention``), or its dictionary; its density counts for nothing.
        densities: those that heads may have, rising, in (0, 1]; 1 is dense.
        noise: levels that divide the run, rising, in (0, 1): n of them make n + 1 parts.
        tables: one for each denoiser.
        made: how it was made: budget, prompts, versions. Nothing goes by it.

    Raises:
        ConfigError: for options that do not fit each other.
    """

    base: Any = None
    densities: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    tables: tuple[HeadTable, ...] = ()
    made: Any = None

    name: ClassVar[str] = "calibrated"
    source: ClassVar[str] = "this project"
    use: ClassVar[str] = "models that were measured by `tilewise calibrate`"
    made_by: ClassVar[str | None] = "tilewise calibrate"

    def __post_init__(self) -> None:
        if self.base is None or not self.tables:
            raise ConfigError(
                "calibrated: this method has no options to be written by hand; make its file with `tilewise calibrate`, and "
                "give the file's name in place of the method's"
            )
        object.__setattr__(self, "base", base_of(self.base))
        object.__setattr__(self, "densities", _rising("densities", self.densities, 1.0))
        object.__setattr__(self, "noise", _rising("noise", self.noise, 1.0 - 1e-9))
        if not self.densities:
            raise ConfigError("calibrated: there are no densities")
        if not _is_list(self.tables):
            raise ConfigError(
                f"calibrated: tables must be a list, one for each denoiser, got {reprlib.repr(self.tables)}"
            )
        tables = tuple(t if isinstance(t, HeadTable) else HeadTable.from_dict(t) for t in self.tables)
        object.__setattr__(self, "tables", tables)
        for table in tables:
            self._check_table(table)
        # One object for each noise level and layer, made here: a call only looks one up. Of one denoiser alone.
        only = tables[0].heads if len(tables) == 1 else ()
        object.__setattr__(self, "_methods", tuple(tuple(map(self._method, level)) for level in only))

    def _check_table(self, table: HeadTable) -> None:
        if len(table.heads) != len(self.noise) + 1:
            raise ConfigError(
                f"calibrated: {len(self.noise)} noise levels make {len(self.noise) + 1} parts of a run, but the table has "
                f"{len(table.heads)}"
            )
        valid = DIGITS[: len(self.densities)]
        for level in table.heads:
            if tuple(map(len, level)) != table.denoiser.heads:
                raise ConfigError(
                    f"calibrated: a table for {len(table.denoiser.heads)} layers of {table.denoiser.model} has "
                    f"{len(level)} layers, or another number of heads in one of them"
                )
            if not set("".join(level)) <= set(valid):
                raise ConfigError(f"calibrated: a head's density must be one of {valid!r}, got {level!r}")

    def _method(self, digits: str) -> BlockSelectionMethod | None:
        """The method of a layer; None: dense."""
        densities = tuple(self.densities[DIGITS.index(digit)] for digit in digits)
        if min(densities) == 1:
            return None
        return dataclasses.replace(self.base, density=None, recall=None, head_density=densities)

    def prepare(self, target: Any, denoiser: nn.Module) -> Self:
        """The method with the table of this denoiser alone.

        Raises:
            ConfigError: it was calibrated for others.
        """
        fitting = {table: table.denoiser.differs(denoiser) for table in self.tables}
        for table, why in fitting.items():
            if why is None:
                return dataclasses.replace(self, tables=(table,))
        raise ConfigError(
            f"calibrated: this calibration is of another model than {type(denoiser).__name__}: "
            + "; ".join(dict.fromkeys(filter(None, fitting.values())))
            + ". Make one for it with `tilewise calibrate`"
        )

    def at(self, layer: int, noise: float | None) -> DynamicMethod | None:
        methods: tuple[tuple[DynamicMethod | None, ...], ...] = self.__dict__["_methods"]
        if noise is None or not methods:  # nothing was prepared for a denoiser
            return self.base
        return methods[bisect.bisect_right(self.noise, noise)][layer]

    @property
    def needs_noise(self) -> bool:
        return True

    @property
    def keeps_memory(self) -> bool:
        return bool(self.base.keeps_memory)

    def layout(self, grid: Grid) -> Layout:
        return self.base.layout(grid)

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        return self.base.scale(layout, head_dim)

    def plan_call(
        self,
        layout: Layout,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        memory: dict[str, Any],
        tick: int,
        window: WindowKeys | None = None,
    ) -> Planned:
        raise ConfigError("calibrated: a call is planned by the method of its layer and noise level")

    def expected_density(self, layout: Layout, heads: int, window: WindowKeys | None = None) -> float:
        """The mean over heads, layers and parts of the run, which are taken to have as many steps."""
        shares = self._shares(layout)
        digits = [digit for table in self.tables for level in table.heads for digit in "".join(level)]
        return sum(shares[DIGITS.index(digit)] for digit in digits) / len(digits)

    def _shares(self, layout: Layout) -> tuple[float, ...]:
        """What each density keeps of a head's pairs on this layout, where some are kept in any case."""
        rows = tuple(density_of_rows(layout.grid, density) for density in self.densities)
        return kept_by_rows(layout, self.base.always, rows)

    def expected_cost(self, layout: Layout, heads: int) -> float:
        density = self.expected_density(layout, heads)
        return density + (1 - density) * layout.blocks / layout.grid.tokens if self.base.compensates else density

    def refuses_call(self, layout: Layout) -> str | None:
        return self.base.refuses_call(layout)

    def head_costs(self) -> tuple[float, ...] | None:
        """The mean over layers and parts of the run; a call goes by those of its layer and noise level."""
        rows = [layer for table in self.tables for level in table.heads for layer in level]
        if len(set(map(len, rows))) != 1:
            return None
        by_head = ([self.densities[DIGITS.index(digit)] for digit in column] for column in zip(*rows, strict=True))
        return tuple(sum(column) / len(column) for column in by_head)

    def refuses_some_heads(self) -> str | None:
        return self.base.refuses_some_heads()

    def refuses_some_samples(self) -> str | None:
        return self.base.refuses_some_samples()

    def refuses_window(self) -> str | None:
        return "a calibration is of whole clips, and not of the window of a KV cache"

    def stays_dense(self, tokens: int, device: torch.device) -> str | None:
        return self.base.stays_dense(tokens, device)

    def describe(self, layout: Layout) -> dict[str, Any]:
        parts, shares = {}, self._shares(layout)
        borders = (0.0, *self.noise, 1.0)
        for number, (low, high) in enumerate(itertools.pairwise(borders)):
            digits = [digit for table in self.tables for digit in "".join(table.heads[number])]
            mean = sum(shares[DIGITS.index(digit)] for digit in digits) / len(digits)
            parts[f"density at noise {low:.2f} to {high:.2f}"] = round(mean, 3)
        return {"base": self.base.name, **parts}

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "base": self.base.to_dict(),
            "densities": list(self.densities),
            "noise": list(self.noise),
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "made": self.made,
        }

    def brief(self) -> dict[str, Any]:
        budget = self.made.get("budget") if isinstance(self.made, Mapping) else None
        return {"name": self.name, "base": self.base.name, "budget": budget, "parts": len(self.noise) + 1}

    def __hash__(self) -> int:  # ``made`` is a dictionary
        return hash((self.base, self.densities, self.noise, self.tables))


def base_of(given: Any) -> BlockSelectionMethod:
    """The method that selects for a calibration, from itself or its dictionary.

    Raises:
        ConfigError: one that has no density for each head.
    """
    if isinstance(given, Mapping):
        options = {key: value for key, value in given.items() if key != "name"}
        given = make_method(str(given.get("name")), options)
    if not isinstance(given, BlockSelectionMethod) or given.select != "rows":
        name = getattr(given, "name", given)
        raise ConfigError(
            f"calibrate: {name} cannot have a density for each head; methods that can are draft and xattention, with "
            "select='rows'"
        )
    if given.within is not None:
        raise ConfigError(
            f"calibrate: {given.name} within={given.within!r}: leave within out; no head could see the whole clip"
        )
    return given


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _is_text(given: Any) -> bool:
    return isinstance(given, str)


def _rising(what: str, given: Any, most: float) -> tuple[float, ...]:
    numbers = isinstance(given, Sequence) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in given)
    if not numbers or any(not 0 < x <= most for x in given) or any(b <= a for a, b in itertools.pairwise(given)):
        raise ConfigError(f"calibrated: {what} must be rising numbers in (0, 1], got {given!r}")
    return tuple(float(x) for x in given)
