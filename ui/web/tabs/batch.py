"""The batch tab: `tilewise batch` on the page. Started again, it resumes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.batch.clip import Watch
from tilewise.pipelines.batch.input import FIELDS, Row, read_rows
from tilewise.pipelines.batch.job import Job as Entry
from tilewise.pipelines.batch.job import slug
from tilewise.pipelines.batch.jobs import Tools, make_jobs, parse_seeds
from tilewise.pipelines.batch.run import Outcome, run_batch
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.options import options_of
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.ui.common.options import config_file, method_config
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_html, log_unexpected
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_of
from tilewise.ui.web.jobs.job_queue import Job, JobQueue
from tilewise.ui.web.tabs.job_stream import cancel, owner_of, status_html, stream

MAX_CLIPS = 200  # of one batch: it holds the device for as long
MAX_INPUT = 10**6  # characters
CANCELLED = "cancelled; finished clips are kept"
SHOWN = 24  # clips that the page plays; all are in the folder
ABOUT = """One prompt per line, or an input file of `tilewise batch` (.txt, .csv, .jsonl), where a line may have settings of its
own. The settings on the left apply to everything else. Finished clips are kept: start again to resume."""


class BatchTab:
    """Built inside a gr.Tab."""

    def __init__(self, controls: Controls, job_queue: JobQueue, outputs: Path) -> None:
        self.controls, self.job_queue, self.outputs = controls, job_queue, outputs
        gr.Markdown(ABOUT)
        prompts = gr.Textbox(label="Prompts, one per line", lines=5, max_lines=20, elem_id="batch-prompts")
        file = gr.File(
            label="Or a file of prompts", file_types=[".txt", ".csv", ".jsonl"], type="filepath", elem_id="batch-file"
        )
        seeds = gr.Textbox("0", label="Seeds for each line, such as 0-3 or 1,7", elem_id="batch-seeds")
        with gr.Row():
            go = gr.Button("Generate all", variant="primary", elem_id="batch")
            stop = gr.Button("Cancel", variant="stop", elem_id="batch-cancel")
        status = gr.HTML(elem_id="batch-status")
        result = gr.HTML(elem_id="batch-result")
        inputs = [prompts, file, seeds, *controls.inputs]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        go.click(self.run, inputs, [status, result], concurrency_limit=None, **quiet)
        stop.click(self.cancel, None, [status], queue=False, **quiet)

    def run(self, request: gr.Request, prompts: str, file: str | None, seeds: str, *given: Any) -> Iterator[list[Any]]:
        try:
            jobs, folder = self._plan(prompts, file, seeds, given)
            work = functools.partial(self._work, jobs, folder)
            ended = False
            for status, _, outcome in stream(self.job_queue, owner_of(request), work, CANCELLED):
                ended = ended or outcome is not None
                if outcome is not None:  # between two clips a cancelled batch ends by itself
                    status = status_html(CANCELLED) if outcome.stopped else ""
                yield [status, self._result(jobs, folder, outcome) if outcome else gr.skip()]
            if not ended:
                yield [gr.skip(), self._result(jobs, folder, None)]
        except Exception as error:
            log_unexpected(error)
            yield [error_html(error), gr.skip()]

    def cancel(self, request: gr.Request) -> Any:
        return cancel(self.job_queue, request)

    def _plan(self, prompts: str, file: str | None, seeds: str, given: Any) -> tuple[list[Entry], Path]:
        """The jobs, all checked, and the folder that belongs to this list of prompts."""
        models, limits = self.controls.models, self.controls.limits
        values = self.controls.values(given)
        settings = settings_of(models, limits, {**values, "prompt": values["prompt"] or "-"})
        if file and prompts.strip():
            raise ConfigError("there are both prompts and a file: clear one of them")
        if file and not Path(file).is_file():  # uploads are swept after a while
            raise ConfigError("the uploaded file is no longer here: choose it again")
        if len(prompts) > MAX_INPUT or (file and Path(file).stat().st_size > MAX_INPUT):
            raise RefusedError(f"the input has at most {MAX_INPUT:,} characters here; `tilewise batch` takes more")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(file) if file else Path(folder) / "prompts.txt"
            if not file:
                path.write_text(prompts, encoding="utf-8")
            try:
                rows = read_rows(path)
                tools = Tools(_config, models.skeleton, models.revision, self._dtype, models.device)
                fields: dict[str, Any] = {name: getattr(settings, name) for name in SETTINGS}
                fields |= {"method": settings.method.to_dict()}
                refuse_files(rows)
                # First: even planning takes long for what is too much.
                check_rows(rows, fields, seed_count(seeds), limits)
                plan = make_jobs(path, rows, tools, command=fields, seeds=parse_seeds(seeds.strip() or "0"))
            except TilewiseError as error:  # the temporary path says nothing to anybody
                raise type(error)(str(error).replace(str(path), path.name)) from error
        for entry in plan.jobs:
            limits.check(entry.settings)
        digest = hashlib.sha256("".join(entry.key for entry in plan.jobs).encode()).hexdigest()
        return plan.jobs, self.outputs / f"batch-{slug(plan.jobs[0].settings.prompt)[:30].strip('-')}-{digest[:8]}"

    def _dtype(self, name: str) -> str:
        own = self.controls.models.dtype
        if name not in ("auto", own):
            raise ConfigError(f"this page runs its models in {own}; leave dtype out")
        return own

    def _work(self, jobs: list[Entry], folder: Path, job: Job) -> Outcome:
        models = self.controls.models
        with contextlib.ExitStack() as stack:

            def load(model: str, *_: Any) -> Any:
                stack.close()
                pipe = models.pipeline(model)[0]
                stack.enter_context(cancellable(pipe, job.cancelled))
                return pipe

            return run_batch(jobs, folder, load, watch=_Shown(job), stop=job.cancelled)

    def _result(self, jobs: list[Entry], folder: Path, outcome: Outcome | None) -> str:
        there = [entry for entry in jobs if (folder / entry.file).is_file()]
        words = [f"{len(there)} of {len(jobs)} clips are in {folder}"]
        if outcome is None or outcome.stopped:
            words.append("start again to go on with the rest")
        else:
            words.append(f"{outcome.made} made now")
            words += [f"{entry.file} failed: {error}" for entry, error in outcome.failed[:10]]
        told = "".join(f"<p>{escape(text)}</p>" for text in words)
        figures = "".join(
            f"<figure>{media.video(folder / e.file, e.settings.prompt, version=e.key[:8], autoplay=False)}"
            f"<figcaption>{escape(e.settings.prompt[:200])}, seed {e.settings.seed}</figcaption></figure>"
            for e in there[:SHOWN]
        )
        return f'{told}<div class="tw-clips">{figures}</div>'


def refuse_files(rows: Sequence[Row]) -> None:
    """Raises ConfigError for a line that names a file: a page reads none of the server's."""
    for row in rows:
        for name in row.fields:
            if name in FIELDS and FIELDS[name].names_file:
                raise ConfigError(f"line {row.line}: {name} is for the command line, not for this page; leave it out")


def seed_count(text: str) -> int:
    """How many seeds a text such as "0-3,7" names, without making a list of them; what it means is `parse_seeds`'s to say."""
    total = 0
    for word in text.split(","):
        low, dash, high = (part.strip() for part in word.partition("-"))
        span = dash and low.isdecimal() and high.isdecimal() and len(low) < 20 and len(high) < 20
        total += max(int(high) - int(low) + 1, 1) if span else 1
    return total


def check_rows(rows: Sequence[Row], fields: Mapping[str, Any], seeds: int, limits: Limits) -> None:
    """Raises RefusedError for more clips than a page makes, or a line whose clip is too large.

    fields: what holds where a line says nothing. seeds: how many each line without one of its own gets.
    """
    clips = sum(1 if "seed" in row.fields else seeds for row in rows)
    if clips > MAX_CLIPS:
        raise RefusedError(f"these are {clips:,} clips; the page makes {MAX_CLIPS} at a time, `tilewise batch` more")
    for row in rows:
        said = {**fields, **row.fields}
        try:
            limits.check_work(*(said[name] for name in ("height", "width", "frames", "steps")))
            limits.check_text_tokens(said["max_sequence_length"])
        except RefusedError as error:
            raise RefusedError(f"line {row.line}: {error}") from error


SETTINGS = tuple(name for name in options_of(GenerateSettings) if name not in ("prompt", "method", "seed"))


class _Shown(Watch):
    """A batch's progress as that of a job of the page."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.prefix = ""
        self.made = self.mine = 0

    def begin(self, total: int, done: int, mine: int) -> None:
        self.mine = mine

    def loading(self, model: str) -> None:
        self.job.tell(f"loading {model}", 0, 1)

    def started(self, job: Entry) -> None:
        self.made += 1
        self.prefix = f"clip {self.made} of {self.mine}: "

    def progress(self, phase: str, done: int, total: int) -> None:
        self.job.tell(self.prefix + phase, done, total)


def _config(method: Any, fields: Mapping[str, Any]) -> Config:
    """As on the command line, but for files: a page reads none of the server's."""
    if isinstance(method, str) and config_file(method) is not None:
        raise ConfigError("a method is a name or a config object here, not a file")
    if isinstance(method, Mapping | str | Config):
        return method_config(method, fields)
    raise ConfigError("a method is a name or a config object")
