"""Numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """As in "1 frame", "2 frames" and "1,025 frames"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
