"""Options of methods that look before they choose: what they may be, checked and brought into one form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tilewise.kernels.plans.layout import MAX_BLOCK_ROWS
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.base import DynamicMethod, Method, make_method
from tilewise.plugins.methods.dynamic.always_keep import ALWAYS_KEEP
from tilewise.plugins.methods.dynamic.selection import RULES
from tilewise.plugins.methods.dynamic.tiles import DEFAULT_TILE, Triple

DEFAULT_DENSITY = 0.25


def checked_map(g: Any) -> dict[str, Any]:
    """The options of a ``MapMethod`` g that have another form than they were given in.

    Raises:
        ConfigError: for values that cannot be.
    """
    found: dict[str, Any] = {}
    if g.tile is not None:
        found["tile"] = _tile(g.name, g.tile)
    if g.compensate not in (None, True, False):
        raise ConfigError(f"{g.name}: compensate must be true or false, got {g.compensate!r}")
    whole_number(g, "refresh", 1)
    whole_number(g, "probe", 0)
    if g.min_tokens is not None:
        whole_number(g, "min_tokens", 0)
    if isinstance(g.always, str) or not isinstance(g.always, Sequence):
        raise ConfigError(f"{g.name}: always must be a list of {', '.join(ALWAYS_KEEP)}, got {g.always!r}")
    for name in g.always:
        one_of(g.name, "always", name, ALWAYS_KEEP)
    found["always"] = tuple(g.always)
    if g.drift is not None and not (is_number(g.drift) and 0 <= g.drift <= 1):
        raise ConfigError(f"{g.name}: drift must be a fall of recall in [0, 1], or null, got {g.drift!r}")
    found["within"] = within = _window_method(g.name, g.within, found.get("tile"))
    far = getattr(within, "far", None)
    if far is not None and (far != "tiles" or g.compensate is False):
        raise ConfigError(
            f"{g.name}: the far field of within is this method's summary rows: give far='tiles' and leave compensate on, got "
            f"far={far!r} and compensate={g.compensate}"
        )
    return found


def checked(g: Any) -> dict[str, Any]:
    """The same for the options that a ``BlockSelectionMethod`` has besides.

    Raises:
        ConfigError: for values that cannot be.
    """
    found: dict[str, Any] = {}
    if g.head_density is not None:
        found["head_density"] = _head_density(g)
    if g.recall is not None:
        fraction(g, "recall")
    if not (is_number(g.safety) and g.safety >= 1):
        raise ConfigError(f"{g.name}: safety must be at least 1, got {g.safety!r}")
    one_of(g.name, "select", g.select, RULES)
    if g.select == "topk" and g.recall is not None:
        raise ConfigError(f"{g.name}: select='topk' keeps a fixed number of blocks; give density, not recall")
    if g.rank is not None:
        one_of(g.name, "rank", g.rank, ("mass", "error"))
    whole_number(g, "floor", 1)
    if g.cap is not None:
        whole_number(g, "cap", 0)
        if g.cap < g.floor or g.select != "rows":
            raise ConfigError(f"{g.name}: cap={g.cap} is for select='rows', and at least floor={g.floor}")
    return found


def _head_density(g: Any) -> tuple[float, ...]:
    given = g.head_density
    if not g.per_head:
        raise ConfigError(f"{g.name}: its heads choose together, so none has a density of its own; give density")
    whole = isinstance(given, Sequence) and not isinstance(given, str) and given
    if not whole or not all(is_number(value) and 0 < value <= 1 for value in given):
        raise ConfigError(f"{g.name}: head_density must be a density in (0, 1] for each head, got {given!r}")
    if g.select != "rows":
        raise ConfigError(f"{g.name}: head_density is for select='rows', got select={g.select!r}")
    return tuple(float(value) for value in given)


def _window_method(method: str, within: Any, tile: Triple | None) -> Method | None:
    if isinstance(within, Mapping):
        options = {key: value for key, value in within.items() if key != "name"}
        within = make_method(str(within.get("name")), options)
    if within is None:
        return None
    if not isinstance(within, Method) or isinstance(within, DynamicMethod) or within.name == "dense":
        raise ConfigError(f"{method}: within must be a method with windows, such as STA, got {within!r}")
    dilation = tuple(getattr(within, "dilation", None) or (1, 1, 1))
    if dilation != (1, 1, 1):
        raise ConfigError(
            f"{method}: within={within.name} with dilation {dilation} orders the tokens by residue classes, and the blocks of "
            f"{method} are boxes of the grid; use {within.name} with dilation (1, 1, 1), or by itself"
        )
    counted = getattr(within, "tile", None)
    if counted is not None and tuple(counted) != tile:
        raise ConfigError(
            f"{method}: the window of within counts tiles of {tuple(counted)}, this method has tiles of "
            f"{tile or 'its own choice'}; leave the tile of within out, or give tile={tuple(counted)} to both"
        )
    return within


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def one_of(method: str, option: str, value: Any, valid: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of ``valid``."""
    if value not in valid:
        raise ConfigError(f"{method}: {option} must be one of {', '.join(valid)}, got {value!r}")


def fraction(g: Any, option: str) -> None:
    """Raises ConfigError for an option that is no number in (0, 1]."""
    value = getattr(g, option)
    if not (is_number(value) and 0 < value <= 1):
        raise ConfigError(f"{g.name}: {option} must be in (0, 1], got {value!r}")


def whole_number(g: Any, option: str, least: int) -> None:
    """Raises ConfigError for an option that is no whole number of at least ``least``."""
    value = getattr(g, option)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{g.name}: {option} must be a whole number of at least {least}, got {value!r}")


def _tile(method: str, value: Any) -> Triple:
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value):
        raise ConfigError(f"{method}: tile must be three whole numbers of tokens (t, h, w), got {value!r}")
    if math.prod(value) > MAX_BLOCK_ROWS:
        raise ConfigError(
            f"{method}: tile {tuple(value)} has {math.prod(value)} tokens; a block is planned as one and has at most "
            f"{MAX_BLOCK_ROWS}, such as {DEFAULT_TILE}"
        )
    return (value[0], value[1], value[2])
