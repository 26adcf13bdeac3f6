"""Show a job in a tab: progress, preview, result, cancellation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from tilewise.pipelines.generation.cancellation import Cancelled
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.jobs.job_queue import Job, JobQueue, State

CANCELLED = "cancelled; nothing was written"


def owner_of(request: gr.Request) -> str:
    """Who asks: one browser tab."""
    return str(request.session_hash or request.username or "nobody")


def stream(
    job_queue: JobQueue, owner: str, work: Callable[[Job], Any], cancelled: str = CANCELLED
) -> Iterator[tuple[str, Any, Any]]:
    """(status as HTML, preview as HTML where there is a new one, result or None) while a job runs.

    The last one has the result, unless the job failed or was cancelled; `cancelled` says so. A job that was done before it
    heard of the cancelling has a result all the same.
    """
    job = job_queue.submit(owner, work)
    shown = None
    yield progress(job.state(0)), "", None
    for state in job_queue.watch(job):
        new = state.picture is not shown  # an image that is sent again would begin anew
        shown = state.picture
        # Said here and not by the button, whose answer might come last and stay.
        status = status_html("cancelling …") if job.cancelled() else progress(state)
        yield status, _html(shown) if new and shown else gr.skip(), None
    if not job.future.done():
        yield status_html(cancelled), "", None
        return
    error = job.future.exception()
    if isinstance(error, Cancelled):
        yield status_html(cancelled), "", None
    elif error is not None:
        yield error_html(error), "", None
    else:
        yield "", "", job.future.result()


def cancel(job_queue: JobQueue, request: gr.Request) -> Any:
    """Cancels what a visitor has queued or at work; the status, unless the work's own stream tells it."""
    return gr.skip() if job_queue.cancel(owner_of(request)) else status_html("nothing is running for you")


def status_html(words: str) -> str:
    """A status in words, as HTML that screen readers announce."""
    return f'<div class="tw-status" role="status">{escape(words)}</div>'


def progress(state: State) -> str:
    """Where a job is: a bar with steps and time left."""
    if state.ahead is not None:
        words = (
            "starting" if state.ahead == 0 else f"waiting: {state.ahead} {'job' if state.ahead == 1 else 'jobs'} ahead"
        )
        return f'<div class="tw-status" role="status">{words} …</div>'
    steps = f" {state.done}/{state.total}" if state.total > 1 else ""
    left = "" if state.left is None else f", about {media.duration(state.left)} left"
    share = f' value="{state.done}" max="{state.total}"' if state.total > 1 else ""
    bar = f'<progress aria-label="progress of {escape(state.phase)}"{share}></progress>'
    words = f"<b>{escape(state.phase)}</b>{steps} · {media.duration(state.seconds)}{left}"
    return f'<div class="tw-status" role="status">{words}{bar}</div>'


def _html(shown: media.Preview) -> Any:
    """The preview, or what leaves the last one standing: a watcher that fails would cancel the job."""
    try:
        return shown.html
    except Exception as error:
        log_unexpected(error)
        return gr.skip()
