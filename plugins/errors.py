"""Every error that tilewise raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TilewiseError(Exception):
    """Base class."""


class ConfigError(TilewiseError, ValueError):
    """A method, preset, option or size that cannot be: the message says which are valid, closest first."""


class UnsupportedModelError(TilewiseError):
    """A pipeline or denoiser that no family adapter serves. Nothing was changed."""


class FallbackError(TilewiseError):
    """``strict=True``, and an attention call could not run the method."""


def unknown(what: str, name: object, valid: Iterable[str]) -> ConfigError:
    """A ``ConfigError`` for a misspelt name that lists the valid ones, closest first."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=max(1, len(names)), cutoff=0.5)
    ordered = close + [n for n in names if n not in close]
    hint = f" Did you mean {close[0]!r}?" if close and close[0] != name else ""
    return ConfigError(f"unknown {what} {name!r}.{hint} Valid: {', '.join(ordered) or 'none'}")
