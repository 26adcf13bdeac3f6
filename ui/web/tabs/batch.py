"""The batch tab: `tilewise batch` on the page. Started again, it resumes."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from tilewise.pipelines.batch.clip import Watch
from tilewise.pipelines.batch.input import FIELDS, Row, read_rows
from tilewise.pipelines.batch.job import Job as Entry
from tilewise.pipelines.batch.job import slug
from tilewise.pipelines.batch.jobs import Tools, make_jobs, parse_seeds
from tilewise.pipelines.batch.manifest import Line
from tilewise.pipelines.batch.run import Outcome, run_batch
from tilewise.pipelines.generation.cancellation import Cancelled, cancellable
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.options import options_of
from tilewise.pipelines.streaming.settings import STREAM, STREAM_OPTIONS
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.text_format import counted
from tilewise.ui.common.options import config_file, method_config
from tilewise.ui.web.common import media
from tilewise.ui.web.common.messages import error_message
from tilewise.ui.web.common.safety import Limits, RefusedError
from tilewise.ui.web.forms.controls import Controls
from tilewise.ui.web.forms.form_parsing import settings_of
from tilewise.ui.web.jobs.fit import check_fits
from tilewise.ui.web.jobs.job import DONE, Job
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.tabs.job_view import JobView

KIND = "batch"
MAX_CLIPS = 200  # of one batch: it holds the device for as long
MAX_INPUT = 10**6  # characters
CANCELLED = "cancelled; finished clips are kept"
SHOWN = 24  # clips that the page plays; all are in the folder
ABOUT = """One prompt per line, or an input file of `tilewise batch` (.txt, .csv, .jsonl), where a line may have settings of its
own. The settings of the page apply to everything else. Finished clips are kept: start again to resume."""


class BatchTab:
    """Built inside a gr.Tab. `own`: the controls of its own that are text."""

    def __init__(self, controls: Controls, job_queue: JobQueue, outputs: Path, job: Any) -> None:
        self.controls, self.outputs = controls, outputs
        gr.Markdown(ABOUT)
        prompts = gr.Textbox(label="Prompts, one per line", lines=5, max_lines=20, elem_id="batch-prompts")
        with gr.Accordion("Or a file of prompts", open=False, elem_id="batch-file-box"):
            file = gr.File(
                label="A file of prompts", file_types=[".txt", ".csv", ".jsonl"], type="filepath", elem_id="batch-file"
            )
        seeds = gr.Textbox("0", label="Seeds for each line, such as 0-3 or 1,7", elem_id="batch-seeds")
        self.own = {"batch-prompts": prompts, "batch-seeds": seeds}
        with gr.Row(elem_classes=["tw-buttons"]):
            go = gr.Button("Generate all", variant="primary", elem_id="batch")
            stop = gr.Button("Cancel", elem_id="batch-cancel", interactive=False)
        status = gr.HTML(elem_id="batch-status")
        preview = gr.HTML()
        result = gr.HTML(elem_id="batch-result")
        job_queue.register(KIND, self.work)
        self.view = JobView(job_queue, KIND, job, self.start, self.result, [""], CANCELLED)
        self.view.wire(go, stop, [prompts, file, seeds, *controls.inputs], status, preview, [result])

    def start(self, prompts: str, file: str | None, seeds: str, *given: Any) -> tuple[str, dict[str, Any]]:
        """The input goes into the job as text: an uploaded file is swept after a while."""
        if file and prompts.strip():
            raise ConfigError("there are both prompts and a file: clear one of them")
        if file and not Path(file).is_file():
            raise ConfigError("the uploaded file is no longer here: choose it again")
        if len(prompts) > MAX_INPUT or (file and Path(file).stat().st_size > MAX_INPUT):
            raise RefusedError(f"the input has at most {MAX_INPUT:,} characters here; `tilewise batch` takes more")
        try:
            text = Path(file).read_text(encoding="utf-8") if file else prompts
        except UnicodeDecodeError as error:
            raise ConfigError(f"{Path(str(file)).name} is not UTF-8 text: {error.reason}") from error
        name = Path(file).name if file else "prompts.txt"
        values = {"name": name, "text": text, "seeds": seeds, "controls": self.controls.values(given)}
        jobs, _ = self._plan(values)
        return f"{counted(len(jobs), 'clip')}: {jobs[0].settings.prompt[:180]}", values

    def work(self, values: Mapping[str, Any], job: Job) -> dict[str, Any]:
        jobs, folder = self._plan(values)
        clips = [[entry.file, entry.settings.prompt[:200], entry.settings.seed, entry.key[:8]] for entry in jobs]
        job.keep(folder=folder.name, clips=clips)
        outcome = self._run(jobs, folder, job)
        if outcome.stopped:  # between two clips a cancelled batch ends by itself
            raise Cancelled(outcome.stopped)
        failed = [[entry.file, error_message(error)] for entry, error in outcome.failed[:10]]
        return {"made": outcome.made, "failed": failed}

    def result(self, job: Job) -> list[Any]:
        if "folder" not in job.result:
            return self.view.nothing
        folder = (self.outputs / str(job.result["folder"])).resolve()
        if folder.parent != self.outputs:  # the list of jobs may have been edited
            raise ConfigError("this batch is in no folder of the outputs")
        return [result_html(folder, job)]

    def _plan(self, values: Mapping[str, Any]) -> tuple[list[Entry], Path]:
        """The jobs, all checked, and the folder that belongs to this list of prompts."""
        models, limits = self.controls.models, self.controls.limits
        said, seeds = dict(values["controls"]), str(values["seeds"])
        settings = settings_of(models, limits, {**said, "prompt": said["prompt"] or "-"})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(str(values["name"])).name
            path.write_text(str(values["text"]), encoding="utf-8")
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
        for entry in {entry.shape: entry for entry in plan.jobs}.values():
            check_fits(models, entry.settings)
        digest = hashlib.sha256("".join(entry.key for entry in plan.jobs).encode()).hexdigest()
        return plan.jobs, self.outputs / f"batch-{slug(plan.jobs[0].settings.prompt)[:30].strip('-')}-{digest[:8]}"

    def _dtype(self, name: str) -> str:
        own = self.controls.models.dtype
        if name not in ("auto", own):
            raise ConfigError(f"this page runs its models in {own}; leave dtype out")
        return own

    def _run(self, jobs: list[Entry], folder: Path, job: Job) -> Outcome:
        models = self.controls.models
        with contextlib.ExitStack() as stack:

            def load(model: str, *_: Any) -> Any:
                stack.close()
                pipe = models.pipeline(model)[0]
                stack.enter_context(cancellable(pipe, job.cancelled))
                return pipe

            return run_batch(jobs, folder, load, watch=_Shown(job, jobs), stop=job.cancelled)


def result_html(folder: Path, job: Job) -> str:
    """The clips that are there, and what became of the others."""
    clips, result = job.result["clips"], job.result
    there = [clip for clip in clips if (folder / Path(clip[0]).name).is_file()]
    words = [f"{len(there)} of {counted(len(clips), 'clip')} are in {folder}"]
    if job.status == DONE:
        words.append(f"{result['made']} made now")
        words += [f"{file} failed: {error}" for file, error in result["failed"]]
    else:
        words.append("start again to go on with the rest")
    told = "".join(f"<p>{escape(text)}</p>" for text in words)
    figures = "".join(
        f"<figure>{media.video(folder / Path(file).name, prompt, version=str(version), autoplay=False)}"
        f"<figcaption>{escape(prompt)}, seed {seed}</figcaption></figure>"
        for file, prompt, seed, version in there[:SHOWN]
    )
    return f'{told}<div class="tw-clips">{figures}</div>'


def refuse_files(rows: Sequence[Row]) -> None:
    """Raises ConfigError for a line that names a file: a page reads none of the server's; and for one of a stream, which puts
    other weights into a model that all visitors share."""
    for row in rows:
        for name in row.fields:
            if name in FIELDS and (FIELDS[name].names_file or name in (STREAM.name, *STREAM_OPTIONS)):
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
    """A batch's progress as that of a job of the page. clips: those of the batch; their operations say how much is left."""

    def __init__(self, job: Job, clips: Sequence[Entry]) -> None:
        self.job = job
        self.prefix = ""
        self.begun = self.mine = 0
        self.to_do = sum(clip.flop for clip in clips)  # of clips that have not ended
        self.done_flop = self.done_seconds = 0.0
        self.at_work: Entry | None = None
        self.clip_began = 0.0

    def begin(self, total: int, done: int, mine: int) -> None:
        self.mine = mine
        self.to_do *= mine / max(total, 1)  # which clips were made before is not told: about their share

    def loading(self, model: str) -> None:
        self.job.tell(f"loading {model}", 0, 1)

    def started(self, job: Entry) -> None:
        self.begun += 1
        self.prefix = f"clip {self.begun} of {self.mine}: "
        self.at_work, self.clip_began = job, time.perf_counter()

    def progress(self, phase: str, done: int, total: int) -> None:
        self.job.tell(self.prefix + phase, done, total, self._left(phase, done, total))

    def finished(self, job: Entry, line: Line) -> None:
        self.done_flop += job.flop
        self.done_seconds += time.perf_counter() - self.clip_began
        self._ended(job)

    def failed(self, job: Entry, error: Exception) -> None:
        self._ended(job)

    def _ended(self, job: Entry) -> None:
        self.to_do = max(0.0, self.to_do - job.flop)
        self.at_work = None

    def _left(self, phase: str, done: int, total: int) -> float | None:
        """Seconds until the last clip is made, at the pace of those that were; in the first, of its denoising so far."""
        spent = time.perf_counter() - self.clip_began
        if self.done_flop:
            return max(0.0, self.to_do * self.done_seconds / self.done_flop - spent)
        if self.at_work is None or not self.at_work.flop or phase != "denoise" or not done:
            return None
        return max(0.0, spent * total / done * self.to_do / self.at_work.flop - spent)


def _config(method: Any, fields: Mapping[str, Any]) -> Config:
    """As on the command line, but for files: a page reads none of the server's."""
    if isinstance(method, str) and config_file(method) is not None:
        raise ConfigError("a method is a name or a config object here, not a file")
    if isinstance(method, Mapping | str | Config):
        return method_config(method, fields)
    raise ConfigError("a method is a name or a config object")
