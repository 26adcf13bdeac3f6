"""An attribute of one object replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Run a block with ``owner.name`` replaced. Afterwards the object has what it had of its own, or its class's is seen."""
    own = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _ABSENT:
            vars(owner).pop(name, None)  # another block's end may have taken it
        else:
            setattr(owner, name, own)
