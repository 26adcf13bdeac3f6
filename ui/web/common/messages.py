"""Error messages for the page. Tracebacks go to the terminal of the server."""

from __future__ import annotations

import logging
from html import escape

from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.pipelines.memory.limits import free_memory, is_out_of_memory
from tilewise.plugins.errors import TilewiseError

LOG = logging.getLogger("tilewise.ui")


def error_message(error: BaseException) -> str:
    """One or two sentences, plain text. Errors that nobody expected are only named."""
    if isinstance(error, TilewiseError):
        return str(error).strip() or type(error).__name__
    if is_out_of_memory(error):
        free_memory()
        return "The GPU's memory did not suffice: take fewer frames or a smaller size, and try again."
    if isinstance(error, MemoryError):
        return "The memory of this machine did not suffice: take fewer frames or a smaller size, and try again."
    return f"Something went wrong here ({type(error).__name__}); the terminal that runs the page says more."


def log_unexpected(error: BaseException) -> None:
    """Writes the traceback of an error that has no message of its own to the log."""
    known = isinstance(error, TilewiseError | MemoryError | Cancelled) or is_out_of_memory(error)
    if not known:
        LOG.error("%s: %s", type(error).__name__, error, exc_info=error)


def error_html(error: BaseException) -> str:
    """The message as HTML that screen readers announce."""
    return f'<div class="tw-error" role="alert">{escape(error_message(error))}</div>'
