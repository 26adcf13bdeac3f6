"""Parse and format memory sizes."""

from __future__ import annotations

import math
import re

from tilewise.plugins.errors import ConfigError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int | float) -> int:
    """Bytes from a number, or from text such as "24GB", "24 GiB" or "500M".

    Raises:
        ConfigError: for anything else, or less than 1.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", str(text).lower())
    unit = UNITS.get(found[2]) if found else None
    size = int(float(found[1]) * unit) if found and unit and math.isfinite(float(found[1])) else 0
    if isinstance(text, bool) or size < 1:
        raise ConfigError(f"a size of memory is a number of bytes, or text such as 24GB or 24GiB, not {text!r}")
    return size


def amount(size: float) -> str:
    """In the largest unit that it has one of, up to GiB: "1.07 GiB", "3.4 MiB"."""
    if size >= 2**30:
        return gib(size)
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
