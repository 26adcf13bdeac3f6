"""The command line: `tilewise generate`, `tilewise explain`, `tilewise env`.

Only typer and rich are imported here; torch and diffusers come in with the command that needs them, so that --help and
usage errors answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewise import __version__
from tilewise.ui.failing import exit_codes, run_app

app = typer.Typer(
    name="tilewise",
    help="Sparse attention for diffusers video pipelines: patched in one call, gone without a trace.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "demo (bundled), a diffusers folder, or a hub id such as org/name."
METHOD_HELP = "sta, dense, a preset (sta-quality, sta-balanced, sta-fast), or a config .json."
WINDOW_HELP = "Window of method sta in tiles, t,h,w: for example 3,3,3."
DENSITY_HELP = "Instead of a window: the fraction of token pairs to keep, in (0, 1]."
NATIVE = "Default: the model's own."


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
    prompt: Annotated[str, typer.Argument(help="What the clip should show.", show_default=False)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "sta-balanced",
    window: Annotated[str | None, typer.Option(help=WINDOW_HELP)] = None,
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    width: Annotated[int | None, typer.Option(help=f"Pixels. {NATIVE}")] = None,
    frames: Annotated[int | None, typer.Option(help=f"Frames of the clip. {NATIVE}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Denoising steps. {NATIVE}")] = None,
    guidance: Annotated[float | None, typer.Option(help=f"Guidance scale; 1 is without. {NATIVE}")] = None,
    negative: Annotated[str, typer.Option(help="What the clip should not show.")] = "",
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The .mp4 to write. Default: outputs/<prompt>-<seed>.mp4", show_default=False)
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="'dense': also make the dense clip, measure both, and put them side by side.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
) -> None:
    """Make a clip (mp4) from a prompt."""
    from tilewise.ui.generating import Request, dry_run_request, generate_request

    wishes = {
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "seed": seed,
    }
    request = Request(prompt, model, method, window, density, wishes, out, compare, device, dtype)
    (dry_run_request if dry_run else generate_request)(request)


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
) -> None:
    """Say what a method would do: grid, tiles, window, density, what stays dense and why. Runs no weights."""
    from tilewise.ui.explaining import explain_command

    explain_command(model, method, window, density, height, width, frames, steps, as_json=as_json)


@app.command()
@exit_codes
def env() -> None:
    """Show versions, devices, and which attention backend each device gets and why."""
    from tilewise.ui.environment import environment_command

    environment_command()


def main() -> None:
    """The entry point of the command `tilewise`."""
    run_app(app)


if __name__ == "__main__":
    main()
