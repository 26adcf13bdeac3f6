"""The list of jobs: running, waiting and ended, of whoever started them. Any of them can be shown, cancelled or run again."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from tilewise.plugins.text_format import counted
from tilewise.ui.web.common.actions import action_button, action_html, chosen
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.jobs.job import ENDED, RUNNING, WAITING, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_view import progress_words, status_html

POLL = 2  # seconds between two looks at the list
SHOWN = 40  # jobs in the list, the latest
NAMES = {
    "generate": ("Generate", "generate"),
    "live": ("Live", "live"),
    "compare": ("Compare", "compare"),
    "watch": ("Watch attention", "attention"),
    "highres": ("High resolution", "highres"),
    "batch": ("Batch", "batch"),
}
"""By kind: what the list calls it, and the tab that shows it."""


class JobsTab:
    """Built inside a gr.Tab. line: a gr.HTML in the page's head that says in a few words what the server is at.

    timer: a gr.Timer of POLL outside of the tabs: one inside would begin when its tab is opened.
    boxes: the fields of `job_box` by kind: setting one shows that job in its tab. tabs: the gr.Tabs.
    """

    def __init__(self, job_queue: JobQueue, line: Any, timer: gr.Timer, boxes: Mapping[str, Any], tabs: Any) -> None:
        self.job_queue, self.kinds = job_queue, list(boxes)
        words = gr.HTML(elem_id="jobs-words")
        self.shown = action_html(jobs_html(job_queue), elem_id="jobs")
        with gr.Row(elem_classes=["tw-buttons"]):
            clear = gr.Button("Clear ended jobs from this list", size="sm", elem_id="jobs-clear")
        seen = gr.State(-1)
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        drawn = [self.shown, line, seen]
        timer.tick(self.look, [seen], drawn, **quiet)
        done = self.shown.click(self.act, None, [words, tabs, *boxes.values()], **quiet)
        done.then(self.draw, None, drawn, **quiet)
        clear.click(self.clear, None, [words], **quiet).then(self.draw, None, drawn, **quiet)
        line.click(lambda: gr.Tabs(selected="jobs"), None, [tabs], **quiet)

    def look(self, seen: int) -> list[Any]:
        """The list, if there is something new in it."""
        at_work = any(job.status == RUNNING for job in self.job_queue.jobs())
        return self.draw() if at_work or seen != self.job_queue.version else [gr.skip()] * 3

    def draw(self) -> list[Any]:
        version = self.job_queue.version
        return [jobs_html(self.job_queue), line_html(self.job_queue), version]

    def act(self, event: gr.EventData) -> list[Any]:
        """What to say, the tab to open, and the job to show in it."""
        action, name = chosen(event)
        nothing = [gr.skip()] * (1 + len(self.kinds))
        try:
            job = self.job_queue.find(name)
            if action == "cancel":
                ended = not self.job_queue.cancel(name)
                return [status_html("that job has ended already" if ended else "cancelling …"), *nothing]
            if action == "again":
                job = self.job_queue.again(name)
            if job is None or job.kind not in self.kinds:
                return [gr.skip(), *nothing]
            boxes = [job.id if kind == job.kind else gr.skip() for kind in self.kinds]
            return ["", gr.Tabs(selected=NAMES[job.kind][1]), *boxes]
        except Exception as error:
            log_unexpected(error)
            return [error_html(error), *nothing]

    def clear(self) -> str:
        self.job_queue.clear()
        return ""


def line_html(job_queue: JobQueue) -> str:
    """What the server is at, in a few words."""
    jobs = job_queue.jobs()
    running = [job for job in jobs if job.status == RUNNING]
    waiting = sum(job.status == WAITING for job in jobs)
    words = [progress_words(job.state(None)) for job in running]
    words += [f"{waiting} waiting"] if waiting else []
    if job_queue.problems:
        words.append("a note about the list of jobs")
    if not words:
        return ""
    return f'<button type="button" class="tw-line" data-action="open" data-name="">{" · ".join(words)}</button>'


def jobs_html(job_queue: JobQueue) -> str:
    """The whole list."""
    jobs = job_queue.jobs()
    problems = "".join(f'<div class="tw-error" role="alert">{escape(text)}</div>' for text in job_queue.problems)
    if not jobs:
        return f'{problems}<p class="tw-quiet">No jobs yet. What you start goes on here when you close the page.</p>'
    rows = "".join(_row(job, job_queue.ahead(job)) for job in jobs[:SHOWN])
    more = f'<p class="tw-quiet">and {counted(len(jobs) - SHOWN, "older job")}</p>' if len(jobs) > SHOWN else ""
    return f'{problems}<ul class="tw-jobs">{rows}</ul>{more}'


def _row(job: Job, ahead: int | None) -> str:
    kind = NAMES.get(job.kind, (job.kind, ""))[0]
    words, title = _words(job, ahead), job.title[:120]
    labelled = f"{kind}: {title}"
    buttons = action_button("show", job.id, "Show", f"show {labelled}")
    if job.status in ENDED:
        buttons += action_button("again", job.id, "Run again", f"run again {labelled}")
    else:
        buttons += action_button("cancel", job.id, "Cancel", f"cancel {labelled}")
    return (
        f'<li class="tw-job tw-{job.status}"><div><span class="tw-kind">{escape(kind)}</span> {escape(title)}'
        f'<div class="tw-quiet">{words}</div></div><div class="tw-row">{buttons}</div></li>'
    )


def _words(job: Job, ahead: int | None) -> str:
    """Where a job stands, as HTML."""
    begun = escape(job.created[:16].replace("T", " ")) + " UTC"
    if job.status == RUNNING:
        return f"running: {progress_words(job.state(None))}"
    if job.status == WAITING:
        return f"waiting, {counted(ahead or 0, 'job')} ahead · {begun}"
    reason = f": {escape(job.error[:300])}" if job.error else ""
    if job.status == "interrupted":
        reason = ": the server stopped while it ran"
    return f"<b>{job.status}</b>{reason} · {begun}"
