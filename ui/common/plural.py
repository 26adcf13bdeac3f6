"""Numbers with their nouns."""

from tilewise.plugins.text_format import counted

__all__ = ["counted"]
