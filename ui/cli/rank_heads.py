"""`tilewise rank-heads`: which heads to guide by (`soft-pag`) for a purpose, found by making and scoring clips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from tilewise.pipelines.calibration.rank_heads import (
    Ranking,
    Score,
    candidates,
    checked,
    rank_heads,
    score_function,
    tries,
    with_heads,
)
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import machine
from tilewise.pipelines.generation.generate import generate
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.media.files import check_writable, write_text
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.memory.retry import within_memory
from tilewise.plugins.additions.soft_pag import SoftPAG
from tilewise.plugins.models.common.denoisers import denoisers_of
from tilewise.plugins.patching import check_config
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.cli.prompt_jobs import PromptJobs, prompt_jobs
from tilewise.ui.common.options import method_config
from tilewise.ui.common.tables import print_settings
from tilewise.ui.common.terminal import say, standard_error, standard_output

FILE = Path("heads.json")
SHOWN = 10  # heads of a round in the table


@dataclasses.dataclass(frozen=True)
class RankRequest:
    """What the command line said. score: a name, or FILE.py:FUNCTION. options: of the clips, those that were given, by name."""

    prompts: Path
    score: str
    options: dict[str, Any]
    layers: str
    u: float
    scale: float
    rounds: int
    keep: int
    lowest: bool
    out: Path | None = None
    device: str = "auto"
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Work(PromptJobs):
    """A checked request."""

    heads: list[str]
    addition: SoftPAG
    score: Score
    outputs: Outputs


def dry_run_rank_heads(request: RankRequest) -> None:
    """Prints what would be done. Nothing is written, and no weights are read."""
    work = _check(request)
    print_settings(work.jobs[0], str(work.device), work.dtype, [work.outputs.file])
    clips = tries(len(work.heads), request.rounds, request.keep) * len(work.jobs)
    say(f"{counted(len(work.heads), 'head')} in {counted(request.rounds, 'round')}: {counted(clips, 'clip')}")


def rank_heads_request(request: RankRequest) -> None:
    """Makes and scores the clips, prints a table, writes the file."""
    notes = standard_error()
    with quiet_libraries():
        work = _check(request)
        first = work.jobs[0]
        with notes.status(f"loading {first.model} …"):
            pipe = load_pipeline(
                first.model, device=request.device, dtype=work.dtype, offload=work.memory.offload, loras=first.lora
            )
        said = [model_revision(first.model), machine(work.device, work.dtype), request.score]
        kept = KeptResults(work.outputs.file.with_suffix(".parts"), "score", said)

        def scored(settings: GenerateSettings) -> float:
            if (there := kept.read(settings)) is not None:
                return float(there)
            found = checked(work.score(generate(pipe, settings).frames, settings.prompt), request.score)
            kept.keep(settings, found)
            return found

        with progress_bars(notes) as progress:

            def search() -> Ranking:
                with cancellable(pipe):
                    return rank_heads(
                        work.jobs, scored, work.heads, work.addition, rounds=request.rounds, keep=request.keep,
                        lowest=request.lowest, tried=lambda done, total: progress("heads", done, total),
                    )  # fmt: skip

            found, _, _ = within_memory(
                pipe, search, work.memory.measures, retry=work.memory.retry_oom, note=notes.note
            )
    _print(found, request.score)
    add = dataclasses.replace(work.addition, heads=found.heads)
    told = {"score": request.score, "lowest": request.lowest, **found.to_dict(), "add": str(add)}
    with work.outputs.claimed() as (file,):
        write_text(file, json.dumps(told, indent=2) + "\n")
    kept.remove()
    say(f"wrote {file}; guide by these heads with --add {add}")


def _check(request: RankRequest) -> Work:
    """Everything that can be wrong is found here, before weights are read."""
    score = score_function(request.score)
    config = method_config(request.options.get("method", "dense"), request.options)
    jobs = prompt_jobs(request.prompts, request.options, config, request.device)
    heads = candidates(jobs.skeleton, request.layers)
    addition = SoftPAG(u=request.u, scale=request.scale)
    tries(len(heads), request.rounds, request.keep)
    guided = with_heads(jobs.jobs[0], addition, heads[:1]).method
    for name, denoiser in denoisers_of(jobs.skeleton).items():
        check_config(name, denoiser, guided.prepare(jobs.skeleton, denoiser))
    outputs = Outputs(request.out or FILE, given=request.out is not None, force=request.force).free()
    check_writable(outputs.file, suffix=".json")
    outputs.check()
    return Work(**vars(jobs), heads=heads, addition=addition, score=score, outputs=outputs)


def _print(found: Ranking, score: str) -> None:
    table = Table("round", "head", score, "gain", title="heads", title_justify="left")
    for number, one in enumerate(found.rounds, 1):
        shown = list(one.scores.items())[:SHOWN]
        for place, (head, value) in enumerate(shown):
            name = f"{head} (chosen)" if head in one.chosen else head
            row = (str(number) if not place else "", name, f"{value:.4f}", f"{value - one.before:+.4f}")
            table.add_row(*row, end_section=place == len(shown) - 1)
    standard_output().print(table)
