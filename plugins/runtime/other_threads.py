"""Whether another thread is in a forward of a denoiser: what is put on it or taken off must not change under that forward.

Looked up in the threads' stacks when somebody patches, so that forwards pay nothing for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import FrameType

from torch import nn

from tilewise.plugins.errors import TilewiseError
from tilewise.plugins.runtime.step_index import first_argument

CALLS = ("_call_impl", "forward")  # functions that are under way while a module is called


def refuse_while_running(what: str, denoisers: Mapping[str, nn.Module]) -> None:
    """Raises TilewiseError if another thread is in a forward of one of the denoisers.

    Between two forwards of a run, and in a whole denoiser that is compiled, it is not seen.
    """
    frames = sys._current_frames()
    # This function's own frame among its variables would be a cycle: all that its callers hold, pipelines and caches, would wait
    # for a garbage collection.
    del frames[threading.get_ident()]
    for ident, frame in frames.items():
        found = _called(frame, denoisers)
        if found is not None:
            name = next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))
            raise TilewiseError(
                f"{what}: {found} is in a forward in another thread ({name}), whose attention would change under it. "
                "Wait for that run to end. To serve several threads, patch once before they start"
            )


def _called(frame: FrameType | None, denoisers: Mapping[str, nn.Module]) -> str | None:
    """The name of a denoiser that a thread is calling, or None."""
    while frame is not None:
        if frame.f_code.co_name in CALLS and frame.f_code.co_argcount:
            module = first_argument(frame)
            for name, denoiser in denoisers.items():
                if module is denoiser:
                    return name
        frame = frame.f_back
    return None
