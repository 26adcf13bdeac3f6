"""The command `tilewise ui`."""

from __future__ import annotations

import contextlib
import math
import threading
from pathlib import Path
from typing import Annotated

import typer

from tilewise.ui.common.collections_paused import no_collections
from tilewise.ui.common.exit_codes import exit_codes

MODELS_HELP = (
    "A model that the page offers: demo, a diffusers folder, a hub id. Several may be given; no other can be used."
)
OUTPUTS_HELP = "Folder of clips. Whoever opens the page can fetch every file in it, and no other file."
AUTH_HELP = "USER:PASSWORD that the page asks for."
FORCE_HELP = "Listen on another interface without a password."
CAP_HELP = "Most height x width x frames x steps of one clip."


@exit_codes
def ui(
    model: Annotated[list[str] | None, typer.Option(help=MODELS_HELP, show_default="demo")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 7860,
    outputs: Annotated[Path, typer.Option(help=OUTPUTS_HELP)] = Path("outputs"),
    auth: Annotated[str | None, typer.Option(help=AUTH_HELP, envvar="TILEWISE_UI_AUTH", show_envvar=True)] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    max_pixels_frames_steps: Annotated[float, typer.Option(help=CAP_HELP)] = 1e10,
    queue: Annotated[int, typer.Option(help="Jobs that may wait for the device, of all visitors together.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Serve a page: make clips, compare them with dense, see what each query attends to. Needs Gradio: the extra ui."""
    from tilewise.plugins.errors import ConfigError
    from tilewise.ui.web.common.safety import Address, Limits, parse_auth

    if not math.isfinite(max_pixels_frames_steps):
        raise ConfigError(f"--max-pixels-frames-steps takes a number such as 1e10, not {max_pixels_frames_steps}")
    address = Address(host, port, parse_auth(auth), force)
    limits = Limits(int(max_pixels_frames_steps), queue)
    with contextlib.ExitStack() as stack:
        with no_collections():
            try:
                import gradio  # noqa: F401
            except ImportError as error:
                hint = "pip install 'tilewise[ui]', or in a clone of it pip install '.[ui]'"
                raise ImportError(f"{error}; the page needs Gradio: {hint}") from error
            from tilewise.ui.cli.progress import quiet_libraries
            from tilewise.ui.web.server import serving

            names = model or ["demo"]
            page = serving(names, outputs, address, limits, device=device, dtype=dtype, libraries=quiet_libraries)
            url = stack.enter_context(page)
        print(f"tilewise ui: {url}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
