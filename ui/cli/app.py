"""The command line: `tilewise generate`, `tilewise batch`, `tilewise compare`, `tilewise verify`,
`tilewise calibrate`, `tilewise rank-heads`, `tilewise explain`, `tilewise tune`, `tilewise methods`, `tilewise presets`,
`tilewise env`.

Only typer and rich are imported here; torch and diffusers come in with the command that needs them, so that --help and
usage errors answer at once.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewise import __version__
from tilewise.pipelines.generation.method_options import METHOD_OPTIONS, SET
from tilewise.pipelines.generation.settings import CLIP_OPTIONS
from tilewise.pipelines.highres.settings import HIGHRES, TWO_STAGE_OPTIONS
from tilewise.pipelines.memory.options import MEMORY_OPTIONS
from tilewise.pipelines.streaming.settings import STREAM, STREAM_OPTIONS
from tilewise.ui.cli.declared_options import declared_options
from tilewise.ui.cli.web import ui
from tilewise.ui.common.exit_codes import exit_codes, run_app

app = typer.Typer(
    name="tilewise",
    help="Sparse attention for diffusers video pipelines: patched in one call, gone without a trace.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

INPUT_HELP = "A .txt (one prompt per line, # comments), .csv or .jsonl file. Fields of a line override the options."
SWEEP_HELP = "Make every clip with each value: method=dense,sta or window=3,3,3;1,5,5. Repeatable."
WARM_UP_HELP = "Run a few discarded steps before each method and size is timed."
DEVICE_HELP = "auto, cpu, cuda or cuda:N."
DRY_RUN_HELP = "Print what would be done and write nothing."
SOURCE_HELP = "Reproduce a clip: its settings, except for those given here."
OUT_HELP = "The .mp4 to write, or .png for one frame. Default: outputs/<prompt>-<seed>.…, numbered until it is free."
FORCE_HELP = "Replace files that are there."
COMPARE_HELP = "'dense': also generate the dense clip, compare both, and write them side by side."
PROMPTS_HELP = "A .txt (one prompt per line), .csv or .jsonl file; lines may have a seed and a negative prompt."
BUDGET_HELP = "Token pairs to keep over all steps, layers and heads of a run, in (0, 1]; dense steps count."
CALIBRATED_METHOD = dataclasses.replace(
    CLIP_OPTIONS["method"],
    help="What selects at each call, at the densities that are chosen: draft or xattention, or a config .json of one.",
    shown_default="draft",
)
SCORE_HELP = "brightness, contrast, detector (of the demo model's world), or FILE.py:FUNCTION of frames and prompt."
PARTS_HELP = "Parts of the run, each with densities of its own."
SHAPE_HELP = "A call instead of a model: frames x rows x columns of latent tokens, heads x head dimension. Repeatable."
TUNED_HELP = "A method or preset to time. Repeatable. Default: sta-balanced and draft-balanced."
LPIPS_HELP = "Measure LPIPS too (pip install lpips)."
OF_BOTH = [*CLIP_OPTIONS.values(), *MEMORY_OPTIONS.values(), HIGHRES, *TWO_STAGE_OPTIONS.values()]
EXPLAINED = ("model", "method", *METHOD_OPTIONS, SET.name, "height", "width", "frames", "steps")  # options of `explain`
STREAM_EXPLAINED = (
    "causal",
    "recipe",
    "chunk",
    "sink",
    "memory",
    "sink_position",
    "policy",
    "storage",
    "way",
    "overlap",
    "adain",
    "prefix_noise",
    "decode_device",
)
GPUS_HELP = "Over how many GPUs one clip is split: heads, tokens, density and memory of each."
PARALLEL_HELP = (
    "How several GPUs divide a clip. context: all split its tokens. cfg: one half computes the prompt's branch of guidance, the "
    "other half the other branch."
)
PLOT_HELP = "Also plot it, to a .png, .svg or .pdf. Dynamic methods run the model for four steps."


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilewise {__version__}")
        raise typer.Exit


# What several processes can share; each of them would do the whole of any other command.
BY_SEVERAL = ("generate", "batch", "ui", "explain", "methods", "presets", "env")


@app.callback()
def _app(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    size, command = os.environ.get("WORLD_SIZE", "1"), context.invoked_subcommand
    if size != "1" and command is not None and command not in BY_SEVERAL:
        raise typer.BadParameter(
            f"`tilewise {command}` is for one process, and a launcher started {size} (WORLD_SIZE): start it without torchrun"
        )


@app.command()
@exit_codes
@declared_options(
    option
    for options in (
        CLIP_OPTIONS,
        MEMORY_OPTIONS,
        {HIGHRES.name: HIGHRES},
        TWO_STAGE_OPTIONS,
        {STREAM.name: STREAM},
        STREAM_OPTIONS,
    )
    for option in options.values()
)
def generate(
    options: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What the clip should show.", show_default=False)] = None,
    source: Annotated[Path | None, typer.Option("--from", help=SOURCE_HELP, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP, show_default=False)] = None,
    compare: Annotated[str | None, typer.Option(help=COMPARE_HELP)] = None,
    runs: Annotated[int, typer.Option(help="With --compare: how often both are timed.")] = 1,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    parallel: Annotated[str, typer.Option(help=PARALLEL_HELP)] = "context",
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Generate a clip (mp4) from a prompt, or reproduce one from its file.

    One clip on several GPUs: torchrun --nproc-per-node 2 -m tilewise generate …
    """
    from tilewise.ui.cli.generate import Request, dry_run_request, generate_request

    request = Request(prompt, options, source, out, compare, device, runs, force, parallel)
    (dry_run_request if dry_run else generate_request)(request)


@app.command()
@exit_codes
@declared_options(option for option in (*OF_BOTH, STREAM, *STREAM_OPTIONS.values()) if option.name != "seed")
def batch(
    options: dict[str, Any],
    input: Annotated[Path, typer.Argument(help=INPUT_HELP, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: outputs/<name of the input>")] = None,
    seeds: Annotated[str, typer.Option(help="For every line without a seed: 7, 0-9 or 0-3,7.")] = "0",
    sweep: Annotated[list[str] | None, typer.Option(help=SWEEP_HELP, metavar="FIELD=A,B")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Regenerate existing clips.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first clip that fails.")] = False,
    max_failures: Annotated[
        int | None, typer.Option(help="Stop after this many failures (counted per process).")
    ] = None,
    warm_up: Annotated[bool | None, typer.Option(help=WARM_UP_HELP, show_default="on a GPU")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Make many clips from a file of prompts. Run it again to resume.

    For several GPUs: torchrun --nproc-per-node 8 -m tilewise batch …, or accelerate launch --multi_gpu -m tilewise batch …
    """
    from tilewise.ui.cli.batch import BatchRequest, batch_request, dry_run_batch

    policy = (overwrite, fail_fast, max_failures, warm_up)
    request = BatchRequest(input, out, seeds, sweep or [], options, device, *policy)
    (dry_run_batch if dry_run else batch_request)(request)


@app.command()
@exit_codes
def compare(
    manifests: Annotated[
        list[Path], typer.Argument(help="manifest.jsonl files, or folders of batches.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The .html to write. Default: comparison.html, numbered until it is free.")
    ] = None,
    embed: Annotated[int, typer.Option(help="MiB of clips to put into the report; the rest is linked.")] = 200,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Compare the methods of batches: a table, and a report (HTML, one file) with the clips side by side."""
    from tilewise.ui.cli.compare import compare_command

    compare_command(manifests, out, embed, force=force)


@app.command()
@exit_codes
@declared_options(option for options in (CLIP_OPTIONS, MEMORY_OPTIONS) for option in options.values())
def verify(
    options: dict[str, Any],
    prompts: Annotated[Path, typer.Option(help=PROMPTS_HELP, show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The .html to write. Default: verification.html, numbered until it is free.")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help=LPIPS_HELP)] = False,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Show what a method costs on your own weights: each prompt dense and sparse from the same noise, measured, with a page.

    Run it again to go on after an interruption. The JSON beside the page can be sent to others.
    """
    from tilewise.ui.cli.verify import VerifyRequest, dry_run_verify, verify_request

    request = VerifyRequest(prompts, options, out, lpips, device, force)
    (dry_run_verify if dry_run else verify_request)(request)


@app.command()
@exit_codes
@declared_options(
    CALIBRATED_METHOD if option.name == "method" else option
    for options in (CLIP_OPTIONS, MEMORY_OPTIONS)
    for option in options.values()
)
def calibrate(
    options: dict[str, Any],
    prompts: Annotated[Path, typer.Option(help=PROMPTS_HELP, show_default=False)],
    budget: Annotated[float, typer.Option(help=BUDGET_HELP)] = 0.4,
    parts: Annotated[int, typer.Option(help=PARTS_HELP)] = 6,
    out: Annotated[
        Path | None, typer.Option(help="The .json to write. Default: calibration.json, numbered until it is free.")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Measure what each head of a model needs, and choose a density for each head, layer and noise level within a budget.

    Makes a dense clip of each prompt. The file is a method, for --method and for tilewise.patch.
    Run it again to go on after an interruption.
    """
    from tilewise.ui.cli.calibrate import CalibrateRequest, calibrate_request, dry_run_calibrate

    request = CalibrateRequest(prompts, budget, options, parts, out, device, force)
    (dry_run_calibrate if dry_run else calibrate_request)(request)


@app.command()
@exit_codes
@declared_options(
    [
        *(CLIP_OPTIONS[name] for name in (*EXPLAINED, "guidance", "dtype", "decode")),
        STREAM,
        *(STREAM_OPTIONS[name] for name in STREAM_EXPLAINED),
    ]
)
def explain(
    options: dict[str, Any],
    gpus: Annotated[int, typer.Option(help=GPUS_HELP)] = 1,
    parallel: Annotated[str, typer.Option(help=PARALLEL_HELP)] = "context",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help=PLOT_HELP, show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
) -> None:
    """Show what a method would do: grid, tiles, window, density, and what stays dense and why.

    With --stream, what it would do in the window of a stream, and the memory of that. --guidance, --dtype and --decode count
    there alone.

    Runs no weights, except for a --plot of a dynamic method.
    """
    from tilewise.ui.cli.explain import explain_command
    from tilewise.ui.cli.explain_stream import explain_stream_command

    if options.get("stream"):
        if gpus != 1:
            raise typer.BadParameter("a stream is made on one GPU: give --gpus or --stream")
        explain_stream_command(options, as_json=as_json, picture=plot)
    else:
        explain_command(options, gpus=gpus, parallel=parallel, as_json=as_json, picture=plot, force=force)


@app.command("rank-heads")
@exit_codes
@declared_options(option for options in (CLIP_OPTIONS, MEMORY_OPTIONS) for option in options.values())
def rank_heads(
    options: dict[str, Any],
    prompts: Annotated[Path, typer.Option(help=PROMPTS_HELP, show_default=False)],
    score: Annotated[str, typer.Option(help=SCORE_HELP)] = "brightness",
    layers: Annotated[str, typer.Option(help="Blocks whose heads are tried, such as 5:9 or 0,3.")] = ":",
    u: Annotated[float, typer.Option(help="How far a head's attention goes to the identity, in (0, 1].")] = 1.0,
    scale: Annotated[float, typer.Option(help="Scale of the guidance.")] = 3.0,
    rounds: Annotated[int, typer.Option(help="Rounds; each tries all heads beside those chosen before.")] = 1,
    keep: Annotated[int, typer.Option(help="Heads that a round chooses.")] = 1,
    lowest: Annotated[bool, typer.Option("--lowest", help="Look for the lowest score.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The .json to write. Default: heads.json, numbered until it is free.")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Find attention heads to guide by (--add soft-pag) for a purpose: clips are made with each and scored.

    For UNets, SD 3 and Flux. Run it again to go on after an interruption.
    """
    from tilewise.ui.cli.rank_heads import RankRequest, dry_run_rank_heads, rank_heads_request

    request = RankRequest(prompts, score, options, layers, u, scale, rounds, keep, lowest, out, device, force)
    (dry_run_rank_heads if dry_run else rank_heads_request)(request)


@app.command()
@exit_codes
@declared_options(CLIP_OPTIONS[name] for name in ("model", "height", "width", "frames"))
def tune(
    options: dict[str, Any],
    shape: Annotated[list[str] | None, typer.Option(help=SHAPE_HELP, metavar="TxHxW:HEADSxDIM")] = None,
    method: Annotated[list[str] | None, typer.Option(help=TUNED_HELP, metavar="METHOD")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    seconds: Annotated[float, typer.Option(help="How long each thing is timed.")] = 0.3,
    max_spread: Annotated[
        float, typer.Option(help="How far runs of one call may differ for a result to be kept.")
    ] = 0.3,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what was tuned on the device.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Time what runs on this machine for a model and size, and remember the fastest: backends, tiles, and from which length on a
    method pays. tilewise.patch goes by it.

    Reads no weights. On a GPU about two minutes; nothing else should use it meanwhile.
    """
    from tilewise.ui.cli.tune import TuneRequest, tune_request

    given = tuple(shape or ()), tuple(method or ())
    tune_request(TuneRequest(options, *given, device, seconds, max_spread, reset, dry_run))


@app.command()
@exit_codes
def presets(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the presets, and the options of every method with their types and defaults."""
    from tilewise.ui.cli.presets import presets_command

    presets_command(as_json=as_json)


@app.command()
@exit_codes
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods: what each keeps, where it comes from, and what it is for."""
    from tilewise.ui.cli.methods import methods_command

    methods_command(as_json=as_json)


@app.command()
@exit_codes
def env() -> None:
    """Show versions, devices, and which attention backend each device gets and why."""
    from tilewise.ui.cli.environment import environment_command

    environment_command()


app.command()(ui)


def main() -> None:
    """The entry point of the command `tilewise`."""
    run_app(app)


if __name__ == "__main__":
    main()
