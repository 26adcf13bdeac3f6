"""Print to the terminal.

Text from outside (prompts, file names, what a clip says of itself) shows as it is: never as rich's markup or emoji codes, as
escape codes of the terminal, or as marks that turn the direction of what stands around them.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

KEPT = "\n\t"
# Marks that embed, override or isolate a direction, and the invisible letters with one (Unicode, annex 9).
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ISOLATE, END_ISOLATE = "\u2068", "\u2069"  # what stands between them has a direction of its own


def shown(text: object) -> str:
    """The text with control characters, direction marks, line separators and lone surrogates as escapes such as ``\\x1b``."""
    return "".join(_escaped(c) if _is_control(c) else c for c in str(text))


def say(text: object = "") -> None:
    """Prints lines to stdout as they are, never wrapped or cut, so that they can be copied."""
    print(shown(text))


class Terminal(Console):
    """A console whose strings are plain text: those that are printed, and those in tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        safe = shown(text)
        if self.is_terminal and any(unicodedata.bidirectional(c) in ("R", "AL") for c in safe):
            safe = "\n".join(f"{ISOLATE}{line}{END_ISOLATE}" for line in safe.split("\n"))
        return super().render_str(safe, **{**options, "markup": False, "emoji": False, "highlight": False})

    def status(self, status: Any, **options: Any) -> Any:
        return super().status(Text(shown(status)), **options)

    def note(self, text: str) -> None:
        self.print(f"note: {text}", style="yellow", soft_wrap=True)


def standard_output() -> Terminal:
    """Standard output. Into a pipe or file it is wide enough that no table cell is cut."""
    terminal = Terminal(highlight=False)
    if not terminal.is_terminal:
        terminal.width = 160
    return terminal


def standard_error() -> Terminal:
    """Standard error: progress and notes."""
    return Terminal(stderr=True, highlight=False)


def _is_control(character: str) -> bool:
    if character.isascii() and character.isprintable():
        return False
    kind = unicodedata.category(character)
    return (kind in ("Cc", "Cs", "Zl", "Zp") and character not in KEPT) or character in DIRECTIONS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
