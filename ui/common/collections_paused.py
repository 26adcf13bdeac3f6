"""No garbage collection while large libraries are imported."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()
_blocks = 0  # under way, in all threads


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No garbage collection in this block, nor of what is there at its end: collections would go over the objects of PyTorch,
    diffusers and Gradio again and again while those are imported, for a second or more. The last of several blocks ends it."""
    global _blocks
    with _LOCK:
        _blocks += 1
        gc.disable()
    try:
        yield
    finally:
        with _LOCK:
            _blocks -= 1
            if not _blocks:
                gc.freeze()
                gc.enable()
