"""`tilewise calibrate`: what each head of a model needs, measured on some prompts, as a file that --method and `patch` take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from tilewise import __version__
from tilewise.pipelines.calibration.calibrate import DENSITIES, Calibration, calibrate, sparse_budget
from tilewise.pipelines.calibration.profile import profile_run
from tilewise.pipelines.calibration.records import RunProfile, Schedule
from tilewise.pipelines.generation.cancellation import cancellable
from tilewise.pipelines.generation.clip_metadata import machine
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.resolve import explain_settings
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.pipelines.loading.revision import model_revision
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.media.output_names import Outputs
from tilewise.pipelines.memory.retry import within_memory
from tilewise.plugins.config import DEFAULT_BLOCKS, Config, save_config
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.methods.calibrated import base_of
from tilewise.plugins.methods.dynamic.base import BlockSelectionMethod
from tilewise.plugins.text_format import counted
from tilewise.ui.cli.progress import progress_bars, quiet_libraries
from tilewise.ui.cli.prompt_jobs import PromptJobs, prompt_jobs, telling_what_is_kept
from tilewise.ui.common.options import method_config
from tilewise.ui.common.tables import print_settings
from tilewise.ui.common.terminal import say, standard_error, standard_output

FILE = Path("calibration.json")


@dataclasses.dataclass(frozen=True)
class CalibrateRequest:
    """What the command line said. options: those that were given, by name."""

    prompts: Path
    budget: float
    options: dict[str, Any]
    parts: int
    out: Path | None = None
    device: str = "auto"
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Work(PromptJobs):
    """A checked request."""

    base: BlockSelectionMethod
    schedule: Schedule
    outputs: Outputs


def dry_run_calibrate(request: CalibrateRequest) -> None:
    """Prints what would be done. Nothing is written, and no weights are read."""
    work = _check(request)
    print_settings(work.jobs[0], str(work.device), work.dtype, [work.outputs.file])
    steps = ", ".join(map(str, work.schedule.middles))
    say(
        f"{counted(len(work.jobs), 'clip')} made densely; measured in steps {steps} of {work.schedule.steps}, counted from 0"
    )


def calibrate_request(request: CalibrateRequest) -> None:
    """Profiles the runs, prints a table, writes the file."""
    notes = standard_error()
    with quiet_libraries():
        work = _check(request)
        first = work.jobs[0]
        with notes.status(f"loading {first.model} …"):
            pipe = load_pipeline(
                first.model, device=request.device, dtype=work.dtype, offload=work.memory.offload, loras=first.lora
            )
        revision, where = model_revision(first.model), machine(work.device, work.dtype)
        said = [revision, where, work.base.to_dict(), dataclasses.astuple(work.schedule), list(DENSITIES)]
        kept = KeptResults(work.outputs.file.with_suffix(".parts"), "run", said)
        if there := kept.count(work.jobs):
            notes.note(f"{counted(there, 'run')} of an earlier calibration kept, and not made again")
        with progress_bars(notes) as progress:

            def measure() -> list[RunProfile]:
                with cancellable(pipe):
                    return [_profile(pipe, settings, work, kept, progress) for settings in work.jobs]

            with telling_what_is_kept(notes, kept, work.jobs, "run"):
                runs, _, _ = within_memory(
                    pipe, measure, work.memory.measures, retry=work.memory.retry_oom, note=notes.note
                )
    made = {
        "tilewise": __version__, "budget": request.budget, "prompts": len(work.jobs), "model": revision,
        "height": first.height, "width": first.width, "frames": first.frames, "steps": first.steps,
    }  # fmt: skip
    found = calibrate(runs, work.base, work.schedule, budget=request.budget, made=made)
    _print(found)
    with work.outputs.claimed() as (file,):
        save_config(found.config, file)
    kept.remove()
    say(f"wrote {file}; use it with --method {file}, or tilewise.patch(pipe, {str(file)!r})")


def _profile(pipe: Any, settings: GenerateSettings, work: Work, kept: KeptResults, progress: Any) -> RunProfile:
    """One run: the one that is kept, or a new one."""
    if (there := kept.read(settings)) is not None:
        return RunProfile.from_dict(there)
    found = profile_run(pipe, settings, work.base, DENSITIES, work.schedule, progress)
    kept.keep(settings, found.to_dict())
    return found


def _check(request: CalibrateRequest) -> Work:
    """Everything that can be wrong is found here, before weights are read."""
    config = method_config(request.options.get("method", "draft"), request.options)
    base = _base(config)
    jobs = prompt_jobs(request.prompts, request.options, config, request.device)
    steps = jobs.jobs[0].steps
    sparse = [step for step in range(steps) if config.runs_at(step, steps)]
    if not sparse or sparse != list(range(sparse[0], steps)):
        raise ConfigError(f"calibrate covers a run to its end: give --steps-sparse FROM,1, got {config.steps}")
    schedule = Schedule(steps, sparse[0], request.parts)
    _check_least(request.budget, sparse_budget(request.budget, schedule), base, config, jobs)
    outputs = Outputs(request.out or FILE, given=request.out is not None, force=request.force).free()
    check_writable(outputs.file, suffix=".json")
    outputs.check()
    return Work(**vars(jobs), base=base, schedule=schedule, outputs=outputs)


def _check_least(budget: float, left: float, base: BlockSelectionMethod, config: Config, jobs: PromptJobs) -> None:
    """Raises ConfigError for a budget below what heads at the lowest density keep: that, or what the method always keeps."""
    lowest = dataclasses.replace(base, density=DENSITIES[0], recall=None)
    first = dataclasses.replace(jobs.jobs[0], method=dataclasses.replace(config, method=lowest))
    told = explain_settings(jobs.skeleton, first)
    if any(row.sparse_layers for row in told.rows) and left < told.density:
        raise ConfigError(
            f"calibrate: a budget of {budget} leaves {left:.3f} of the pairs to the sparse steps; {told.density:.3g} is the "
            f"least that they keep at this size, with always={', '.join(base.always) or 'none'}; raise --budget, or keep fewer "
            "steps dense"
        )


def _base(config: Config) -> BlockSelectionMethod:
    """Raises ConfigError for a config that says what calibration decides."""
    if config.step_cache is not None:
        raise ConfigError("calibrate measures every forward of a run: leave --cache out, and give it when you generate")
    if config.add is not None:
        raise ConfigError("calibrate measures the model as it is: leave --add out, and give it when you generate")
    if config.blocks != DEFAULT_BLOCKS:
        raise ConfigError(f"calibrate decides which heads stay dense: leave --blocks out, got {config.blocks!r}")
    base = base_of(config.method)
    usual = type(base)()
    for name in ("density", "recall", "head_density", "refresh"):
        if getattr(base, name) != getattr(usual, name):
            raise ConfigError(
                f"calibrate decides the density of each head at each call: leave {name} out, got {getattr(base, name)!r}"
            )
    return base


def _print(found: Calibration) -> None:
    table = Table(title="calibration", title_justify="left", show_header=False)
    table.add_row("pairs kept over the whole run", f"{found.density:.3f}")
    table.add_row("error of a layer's output", f"{found.error:.4f}, relative, in sparse steps")
    table.add_row("of one density for all heads", f"{found.uniform:.4f} at as many pairs")
    described = found.config.method.to_dict()
    table.add_row(
        "noise levels that divide the run", ", ".join(f"{level:.3f}" for level in described["noise"]) or "none"
    )
    standard_output().print(table)
