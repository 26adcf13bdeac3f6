"""Set an attribute of one object for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def temporary_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Run a block with ``owner.name`` set to ``value``; then restore what was there, its own attribute or its class's."""
    own = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _ABSENT:
            vars(owner).pop(name, None)  # another block's end may have taken it
        else:
            setattr(owner, name, own)
