"""Show a job in a tab: start it, follow it from any browser tab, cancel it, show what came of it.

The tab keeps the job's id in a hidden field, which page.js puts into the address of the page. Whatever sets that field, the
button, a reload or "Show" in the list of jobs, makes the tab follow that job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

import gradio as gr

from tilewise.plugins.text_format import counted
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import LOG, error_html, log_unexpected
from tilewise.ui.web.jobs.job import CANCELLED, DONE, ENDED, FAILED, INTERRUPTED, Job, State
from tilewise.ui.web.jobs.job_queue import JobQueue

GONE = "this job is no longer in the list"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class JobView:
    """Connects the components of one tab, which are all inside a gr.Blocks, to jobs of one kind.

    job: from `job_box`; outside of the tabs, whose components are not there before they are opened.
    start: (title, values) of the job from the values of `inputs`; raises what it refuses. result: one value for each of
    `outputs` for a job that has ended, however it ended; its files may be gone by then. nothing: the same before there is any.
    cancelled: what a cancelled job says.
    """

    def __init__(
        self,
        job_queue: JobQueue,
        kind: str,
        job: Any,
        start: Callable[..., tuple[str, dict[str, Any]]],
        result: Callable[[Job], Sequence[Any]],
        nothing: Sequence[Any],
        cancelled: str = "cancelled; nothing was written",
    ) -> None:
        self.job_queue, self.kind, self.cancelled = job_queue, kind, cancelled
        self.start, self.result, self.nothing = start, result, list(nothing)
        self.job = job
        self._shown: dict[str, object] = {}  # by browser tab: which of its streams is the latest

    def wire(self, go: Any, stop: Any, inputs: Sequence[Any], status: Any, preview: Any, outputs: Sequence[Any]) -> Any:
        """Connects the buttons; the event that ends when a job has. Cancel is only there while there is something to cancel."""
        began = go.click(self._begin, list(inputs), [self.job, status], **QUIET)
        self.job.change(None, [self.job], None, js=f"(id) => tilewise.remember('job-{self.kind}', id)")
        shown = [go, stop, status, preview, *outputs]
        # Several at a time: the stream of the job that was shown before ends by itself.
        followed = self.job.change(
            self._follow, [self.job], shown, concurrency_limit=None, trigger_mode="multiple", **QUIET
        )
        stop.click(self._cancel, [self.job], [status], queue=False, **QUIET)
        return began, followed

    def _begin(self, *given: Any) -> list[Any]:
        try:
            title, values = self.start(*given)
            return [self.job_queue.submit(self.kind, title, values).id, status_html("starting …")]
        except Exception as error:
            log_unexpected(error)
            return [gr.skip(), error_html(error)]

    def _cancel(self, name: str) -> Any:
        """The status, unless the stream of the job tells it."""
        return gr.skip() if self.job_queue.cancel(str(name)) else status_html("nothing is running here")

    def _follow(self, request: gr.Request, name: str) -> Iterator[list[Any]]:
        """Everything that the tab shows of a job, while it goes on and when it has ended."""
        tab, this = str(request.session_hash), object()
        self._shown[tab] = this
        try:
            for told in self.follow(name):
                if self._shown.get(tab) is not this:
                    # Gradio sends the last values of a stream once more as it ends, which may be after the other stream has.
                    yield [gr.skip()] * len(told)
                    return
                yield told
        finally:
            if self._shown.get(tab) is this:
                del self._shown[tab]

    def follow(self, name: str) -> Iterator[list[Any]]:
        """[go, stop, status, preview, *outputs] for a job by its id."""
        idle, busy = buttons(False), buttons(True)
        job = self.job_queue.find(str(name))
        if job is None or job.kind != self.kind:
            yield [*idle, status_html(GONE) if name else "", "", *self.nothing]
            return
        shown = None
        if job.status not in ENDED:  # what is shown must not be taken for what comes
            yield [*busy, progress(job.state(self.job_queue.ahead(job))), "", *self.nothing]
        skipped = [gr.skip()] * len(self.nothing)
        for state in self.job_queue.watch(job):
            new = (
                state.picture is not None and state.picture is not shown
            )  # an image that is sent again would begin anew
            shown = state.picture
            # Said here and not by the button, whose answer might come last and stay.
            status = status_html("cancelling …") if job.cancelled() else progress(state)
            yield [gr.skip(), gr.skip(), status, _html(shown) if new else gr.skip(), *skipped]
        try:
            told = list(self.result(job))
            yield [*idle, ended_html(job, self.cancelled), "", *told]
        except Exception as error:  # files that somebody took away
            log_unexpected(error)
            yield [*idle, error_html(error), "", *self.nothing]


def job_box(kind: str) -> Any:
    """The hidden field for the id of the job of a kind that a browser tab shows."""
    return gr.Textbox("", visible="hidden", elem_id=f"job-{kind}", container=False)


def buttons(busy: bool) -> list[Any]:
    """Go and Cancel."""
    return [gr.update(interactive=not busy), gr.update(interactive=busy)]


def ended_html(job: Job, cancelled: str) -> str:
    """What there is to say about how a job ended."""
    if job.status == FAILED:
        return f'<div class="tw-error" role="alert">{escape(job.error or "it failed")}</div>'
    words = {
        DONE: "",
        CANCELLED: cancelled,
        INTERRUPTED: "interrupted: the server stopped while this ran. Start it again here, or with “Run again” under Jobs",
    }
    return status_html(words[job.status]) if words[job.status] else ""


def status_html(words: str) -> str:
    """A status in words, as HTML that screen readers announce."""
    return f'<div class="tw-status" role="status">{escape(words)}</div>'


def progress(state: State) -> str:
    """Where a job is: a bar with steps and time left."""
    if state.ahead is not None:
        words = f"waiting: {counted(state.ahead, 'job')} ahead" if state.ahead else "starting"
        return f'<div class="tw-status" role="status">{words} …</div>'
    words = progress_words(state)
    share = f"{100 * state.done / state.total:.0f}" if state.total > 1 else ""
    value = f' aria-valuenow="{share}"' if share else ""
    style = f' style="width:{share}%"' if share else ""
    bar = (
        f'<div class="tw-progress{"" if share else " tw-busy"}" role="progressbar" aria-valuemin="0" aria-valuemax="100"{value} '
        f'aria-label="progress of {escape(state.phase)}"><span{style}></span></div>'
    )
    return f'<div class="tw-status" role="status">{words}{bar}</div>'


def progress_words(state: State) -> str:
    """The same without the bar, as HTML."""
    steps = f" {state.done}/{state.total}" if state.total > 1 else ""
    left = "" if state.left is None else f", about {media.duration(state.left)} left"
    if state.all_left is not None:
        left = f", about {media.duration(state.all_left)} left in all"
    return f"<b>{escape(state.phase or 'starting')}</b>{steps} · {media.duration(state.seconds)}{left}"


def _html(shown: Any) -> Any:
    """The preview, or what leaves the last one standing: what a watcher cannot draw is no failure of the job."""
    try:
        return shown.html
    except Exception as error:
        LOG.warning("no preview: %r", error)
        return gr.skip()
