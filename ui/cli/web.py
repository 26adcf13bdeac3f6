"""The command `tilewise ui`."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tilewise.ui.common.collections_paused import no_collections
from tilewise.ui.common.exit_codes import exit_codes

MODELS_HELP = (
    "A model that the page offers: demo, a diffusers folder, a hub id. Several may be given; no other can be used."
)
OUTPUTS_HELP = "Folder of clips. Whoever opens the page can fetch every file in it, and no other file."
AUTH_HELP = "USER:PASSWORD that the page asks for."
FORCE_HELP = "Listen on another interface without a password."
PARALLEL_HELP = (
    "Started by torchrun, how the processes divide a clip. context: all split its tokens. cfg: half for each branch."
)
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
    parallel: Annotated[str, typer.Option(help=PARALLEL_HELP)] = "context",
) -> None:
    """Serve a page: make clips, compare them with dense, see what each query attends to. Needs Gradio: the extra ui."""
    from tilewise.pipelines.parallel.world import world_from_environment
    from tilewise.plugins.errors import ConfigError
    from tilewise.ui.web.common.safety import Address, Limits, parse_auth

    if not math.isfinite(max_pixels_frames_steps):
        raise ConfigError(f"--max-pixels-frames-steps takes a number such as 1e10, not {max_pixels_frames_steps}")
    address = Address(host, port, parse_auth(auth), force)
    limits = Limits(int(max_pixels_frames_steps), queue)
    names, world = model or ["demo"], world_from_environment()
    if world.size == 1:
        if parallel != "context":
            from tilewise.pipelines.parallel.checks import check_way_for
            from tilewise.pipelines.parallel.ranks import Ranks

            check_way_for(parallel, Ranks(world))
        with _served(names, outputs, address, limits, device, dtype):
            threading.Event().wait()
    from tilewise.ui.cli.web_ranks import shared_clips

    with shared_clips(world, names, device, dtype, parallel) as shared:
        if shared is not None:
            with _served(names, outputs, address, limits, world.device(device), dtype, shared):
                shared.wait()


@contextlib.contextmanager
def _served(
    names: list[str], outputs: Path, address: Any, limits: Any, device: str, dtype: str, shared: Any = None
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with no_collections():
            try:
                import gradio  # noqa: F401
            except ImportError as error:
                hint = "pip install 'tilewise[ui]', or in a clone of it pip install '.[ui]'"
                raise ImportError(f"{error}; the page needs Gradio: {hint}") from error
            from tilewise.ui.cli.progress import quiet_libraries
            from tilewise.ui.web.server import serving

            page = serving(
                names, outputs, address, limits, device=device, dtype=dtype, libraries=quiet_libraries, shared=shared
            )
            url = stack.enter_context(page)
        print(f"tilewise ui: {url}  (Ctrl-C ends it)", flush=True)
        yield
