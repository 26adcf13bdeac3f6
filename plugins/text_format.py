"""Small helpers for what people read: tables as plain text, block numbers as ranges, numbers with their nouns."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def counted(number: int, noun: str) -> str:
    """As in "1 frame", "2 frames" and "1,025 frames"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: list[int]) -> str:
    """ "0-3,5" for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def render(table: Table) -> str:
    # Names and reasons are no markup: "[1, 2]" or "[bold]" stay as they are.
    console = Console(file=io.StringIO(), width=110, force_terminal=False, markup=False, emoji=False, highlight=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
