"""The command line: `tilewise generate`, `tilewise batch`, `tilewise compare`, `tilewise explain`, `tilewise env`.

Only typer and rich are imported here; torch and diffusers come in with the command that needs them, so that --help and
usage errors answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewise import __version__
from tilewise.ui.cli import two_stage_options
from tilewise.ui.cli.web import ui
from tilewise.ui.common.exit_codes import exit_codes, run_app

app = typer.Typer(
    name="tilewise",
    help="Sparse attention for diffusers video pipelines: patched in one call, gone without a trace.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "demo (bundled), a diffusers folder, or a hub id such as org/name."
METHOD_HELP = (
    "sta, draft, xattention, inward, neighborhood, dense, a preset (sta-quality, sta-balanced, sta-fast, draft-quality, "
    "draft-fast), or a config .json."
)
WINDOW_HELP = "Window of method sta in tiles, t,h,w: for example 3,3,3."
DENSITY_HELP = "Instead of a window: the fraction of token pairs to keep, in (0, 1]."
DTYPE_HELP = "auto, float32, bfloat16 or float16."
INPUT_HELP = "A .txt (a prompt a line, # comments), .csv or .jsonl file; fields of a line override the options."
SWEEP_HELP = "Make every clip with each value: method=dense,sta or window=3,3,3;1,5,5. May be given several times."
RETRY_HELP = "Out of GPU memory: try again with VAE tiling, then with offloading too."
WARM_UP_HELP = "Run the fewest steps and throw them away before a method and size is timed."
NATIVE = "Default: the model's own."
PLOT_HELP = "Also draw it: a .png, .svg or .pdf. A method that chooses by the content runs the model for four steps."
HIGHRES_HELP = "Past the model's size: a clip at its own size first, then --height and --width from that."


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilewise {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@exit_codes
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the clip should show.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="demo")] = None,
    method: Annotated[str | None, typer.Option(help=METHOD_HELP, show_default="sta-balanced")] = None,
    window: Annotated[str | None, typer.Option(help=WINDOW_HELP)] = None,
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    width: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    frames: Annotated[int | None, typer.Option(help=f"Frames of the clip. {NATIVE}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps. {NATIVE}")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"Guidance scale; 1 is without. {NATIVE}")] = None,
    negative: Annotated[str | None, typer.Option(help="What the clip should not show.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the starting noise.", show_default="0")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A clip to make again: its settings, but for those given here.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .mp4 to write, or .png for one frame. Default: outputs/<prompt>-<seed>.…", show_default=False
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="'dense': also make the dense clip, measure both, and put them side by side.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP, show_default="auto")] = None,
    highres: Annotated[bool, typer.Option("--highres", help=HIGHRES_HELP)] = False,
    strength: two_stage_options.Strength = None,
    refresh: two_stage_options.Refresh = None,
    global_path: two_stage_options.GlobalPath = None,
    guided: two_stage_options.Guided = None,
    upscale: two_stage_options.Upscale = None,
    precision: two_stage_options.Precision = None,
    flow_shift: two_stage_options.FlowShift = None,
    rope: two_stage_options.Rope = None,
    rope_time: two_stage_options.RopeTime = None,
    native: two_stage_options.Native = None,
    max_memory: two_stage_options.MaxMemory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Make a clip (mp4) from a prompt, or again from a clip."""
    from tilewise.ui.cli.generate import Request, dry_run_request, generate_request
    from tilewise.ui.common.options import highres_options

    wishes = {
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "seed": seed,
    }
    stages = {
        "strength": strength,
        "refresh": refresh,
        "global_path": global_path,
        "guided": guided,
        "upscale": upscale,
        "flow_shift": flow_shift,
        "rope": rope,
        "rope_time": rope_time,
        "precision": precision,
        "native": native,
        "max_memory": max_memory,
    }
    second = highres_options(highres, stages)
    request = Request(prompt, model, method, window, density, wishes, out, compare, device, dtype, source, second)
    (dry_run_request if dry_run else generate_request)(request)


@app.command()
@exit_codes
def batch(
    input: Annotated[Path, typer.Argument(help=INPUT_HELP, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder. Default: outputs/<name of the input>")] = None,
    seeds: Annotated[str, typer.Option(help="For every line without a seed: 7, 0-9 or 0-3,7.")] = "0",
    sweep: Annotated[list[str] | None, typer.Option(help=SWEEP_HELP, metavar="FIELD=A,B")] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP, show_default="demo")] = None,
    method: Annotated[str | None, typer.Option(help=METHOD_HELP, show_default="sta-balanced")] = None,
    window: Annotated[str | None, typer.Option(help=WINDOW_HELP)] = None,
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    width: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    frames: Annotated[int | None, typer.Option(help=f"Frames of a clip. {NATIVE}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps. {NATIVE}")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"Guidance scale; 1 is without. {NATIVE}")] = None,
    negative: Annotated[str | None, typer.Option(help="What the clips should not show.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make clips again that are there.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first clip that fails.")] = False,
    max_failures: Annotated[int | None, typer.Option(help="Stop after so many (each process counts its own).")] = None,
    retry_oom: Annotated[bool, typer.Option("--retry-oom", help=RETRY_HELP)] = False,
    warm_up: Annotated[bool | None, typer.Option(help=WARM_UP_HELP, show_default="on a GPU")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP, show_default="auto")] = None,
    highres: Annotated[bool | None, typer.Option("--highres", help=HIGHRES_HELP)] = None,
    strength: two_stage_options.Strength = None,
    refresh: two_stage_options.Refresh = None,
    global_path: two_stage_options.GlobalPath = None,
    guided: two_stage_options.Guided = None,
    upscale: two_stage_options.Upscale = None,
    precision: two_stage_options.Precision = None,
    flow_shift: two_stage_options.FlowShift = None,
    rope: two_stage_options.Rope = None,
    rope_time: two_stage_options.RopeTime = None,
    native: two_stage_options.Native = None,
    max_memory: two_stage_options.MaxMemory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Make many clips from a file of prompts. Run again, it goes on where it was stopped.

    For several GPUs: torchrun --nproc-per-node 8 -m tilewise batch …, or accelerate launch -m tilewise batch …
    """
    from tilewise.ui.cli.batch import BatchRequest, batch_request, dry_run_batch

    fields = {
        "model": model,
        "method": method,
        "window": window,
        "density": density,
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "dtype": dtype,
        "highres": highres,
        "strength": strength,
        "refresh": refresh,
        "global_path": global_path,
        "guided": guided,
        "upscale": upscale,
        "precision": precision,
        "flow_shift": flow_shift,
        "rope": rope,
        "rope_time": rope_time,
        "native": native,
        "max_memory": max_memory,
    }
    policy = (overwrite, fail_fast, max_failures, retry_oom, warm_up)
    request = BatchRequest(input, out, seeds, sweep or [], fields, device, *policy)
    (dry_run_batch if dry_run else batch_request)(request)


@app.command()
@exit_codes
def compare(
    manifests: Annotated[
        list[Path], typer.Argument(help="manifest.jsonl files, or folders of batches.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The .html to write.")] = Path("comparison.html"),
    embed: Annotated[int, typer.Option(help="MiB of clips to put into the report; the rest is linked.")] = 200,
) -> None:
    """Compare the methods of batches: a table, and a report (HTML, one file) with the clips side by side."""
    from tilewise.ui.cli.compare import compare_command

    compare_command(manifests, out, embed)


@app.command()
@exit_codes
def explain(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "sta-balanced",
    window: Annotated[str | None, typer.Option(help=WINDOW_HELP)] = None,
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    width: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    frames: Annotated[int | None, typer.Option(help=f"Frames of the clip. {NATIVE}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps. {NATIVE}")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help=PLOT_HELP, show_default=False)] = None,
) -> None:
    """Say what a method would do: grid, tiles, window, density, what stays dense and why.

    Runs no weights, but for a --plot of a method that chooses by the content.
    """
    from tilewise.ui.cli.explain import explain_command

    explain_command(model, method, window, density, height, width, frames, steps, as_json=as_json, picture=plot)


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
