"""`tilewise verify`: pairs of clips, dense and sparse, over a file of prompts; what they differ by, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import machine
from tilewise.pipelines.generation.generate import warm_up
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import DEFAULT_METHOD
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.media.files import check_writable, replacing, sidecar, write_text
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.memory.retry import within_memory
from tilewise.pipelines.verification.measures import Lpips
from tilewise.pipelines.verification.pairs import Pair, verify_pairs
from tilewise.pipelines.verification.report import make_report
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.cli.prompt_jobs import PromptJobs, prompt_jobs, telling_what_is_kept
from tilewise.ui.cli.verify_page import page, summary_cells
from tilewise.ui.common.options import method_config
from tilewise.ui.common.tables import print_settings
from tilewise.ui.common.terminal import say, standard_error, standard_output

REPORT = Path("verification.html")


@dataclasses.dataclass(frozen=True)
class VerifyRequest:
    """What the command line said. options: those that were given, by name."""

    prompts: Path
    options: dict[str, Any]
    out: Path | None = None
    lpips: bool = False
    device: str = "auto"
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Work(PromptJobs):
    """A checked request."""

    outputs: Outputs


def dry_run_verify(request: VerifyRequest) -> None:
    """Prints what would be done. Nothing is written, and no weights are read."""
    work = _check(request)
    files = [work.outputs.file, sidecar(work.outputs.file)]
    print_settings(work.jobs[0], str(work.device), work.dtype, files)
    say(explain_settings(work.skeleton, work.jobs[0]))
    say(f"{counted(len(work.jobs), 'pair')} of clips, one of each dense; the settings above are of the first")


def verify_request(request: VerifyRequest) -> None:
    """Makes the pairs, prints a table, writes the report and the page."""
    notes = standard_error()
    with quiet_libraries():
        work = _check(request)
        first = work.jobs[0]
        lpips = Lpips(work.device) if request.lpips else None
        with notes.status(f"loading {first.model} …"):
            pipe = load_pipeline(
                first.model, device=request.device, dtype=work.dtype, offload=work.memory.offload, loras=first.lora
            )
        for note in explain_settings(work.skeleton, first).warnings:
            notes.note(note)
        revision, where = model_revision(first.model), machine(work.device, work.dtype)
        kept = KeptResults(
            work.outputs.file.with_suffix(".parts"), "pair", [revision, where, work.memory.offload, request.lpips]
        )
        there = kept.count(work.jobs)
        if there:
            notes.note(
                f"{counted(there, 'pair')} of an earlier run {'is' if there == 1 else 'are'} kept, and not made again"
            )
        with progress_bars(notes) as progress:

            def make() -> list[Pair]:
                with cancellable(pipe):
                    if there < len(work.jobs):
                        warm_up(pipe, first, progress)
                    return verify_pairs(pipe, work.jobs, kept=kept, lpips=lpips, progress=progress)

            with telling_what_is_kept(notes, kept, work.jobs, "pair"):
                pairs, measures, _ = within_memory(
                    pipe, make, work.memory.measures, retry=work.memory.retry_oom, note=notes.note
                )
    where |= {"offload": work.memory.offload, "memory_saving": measures}
    report = make_report(first, revision, where, [pair.found for pair in pairs])
    _print(report)
    with work.outputs.claimed() as (file,):
        with replacing(file) as part:
            part.write_text(page(report, pairs), encoding="utf-8")
        write_text(sidecar(file), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    kept.remove()
    say(f"wrote {file}")
    say(f"wrote {sidecar(file)}")


def _check(request: VerifyRequest) -> Work:
    """Everything that can be wrong is found here, before weights are read."""
    options = request.options
    config = method_config(options.get("method", DEFAULT_METHOD), options)
    if config.is_stock:
        raise ConfigError(
            "verify compares a method with dense attention; choose another --method than dense, or a --cache"
        )
    jobs = prompt_jobs(request.prompts, options, config, request.device)
    outputs = Outputs(request.out or REPORT, given=request.out is not None, force=request.force).free()
    check_writable(outputs.file, suffix=".html")
    outputs.check()
    return Work(**vars(jobs), outputs=outputs)


def _print(report: dict[str, Any]) -> None:
    table = Table(title="against dense: mean ± standard deviation over pairs", title_justify="left", show_header=False)
    for name, words in summary_cells(report["summary"]):
        table.add_row(name, words)
    standard_output().print(table)
