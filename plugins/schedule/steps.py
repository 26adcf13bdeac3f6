"""Which denoising steps of a run a method runs at: a part of the schedule as fractions, or steps by number."""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

from tilewise.plugins.errors import ConfigError

Steps: TypeAlias = tuple[float, float] | str
"""(from, to) as fractions of the schedule, or a slice of step numbers: "1:" all but the first, "2:6" the third to the sixth,
":-1" all but the last."""


def checked_steps(value: Any) -> Steps:
    """``value`` in its own form. Raises ConfigError for what is neither two fractions nor a slice of step numbers."""
    if isinstance(value, str):
        if _slice(value) is None:
            raise ConfigError(
                f"steps must be two fractions (from, to), or step numbers such as '1:' or '2:6', got {value[:80]!r}"
            )
        return value.replace(" ", "")
    try:
        low, high = (float(x) for x in value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"steps must be two fractions (from, to), or step numbers such as '1:', got {value!r}"
        ) from error
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"steps must be fractions with 0 ≤ from ≤ to ≤ 1, got {value!r}")
    return low, high


def runs_at(steps: Steps, step: int, total: int) -> bool:
    """Whether step ``step`` of ``total``, counted from 0, is among them."""
    if isinstance(steps, str):
        part = _slice(steps)
        assert part is not None
        return step in range(*part.indices(total))
    # The 1e-9 absorbs rounding: 0.1 · 30 is 3.0000000000000004, and must count as 3 steps.
    return math.ceil(steps[0] * total - 1e-9) <= step < math.ceil(steps[1] * total - 1e-9)


def in_any_run(steps: Steps) -> bool | None:
    """True: all steps of every run are among them; False: none is; None: that depends on the step."""
    if isinstance(steps, str):
        return True if steps in (":", "0:") else None
    if steps == (0.0, 1.0):
        return True
    return False if steps[0] == steps[1] else None


def steps_words(steps: Steps) -> str:
    """As in "0.25 to 1", or "1:"."""
    return steps if isinstance(steps, str) else f"{steps[0]:g} to {steps[1]:g}"


def _slice(text: str) -> slice | None:
    found = re.fullmatch(r"\s*(-?[0-9]{1,7})?\s*:\s*(-?[0-9]{1,7})?\s*", text)
    return None if found is None else slice(*(None if part is None else int(part) for part in found.groups()))
