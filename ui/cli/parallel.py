"""`tilewise generate` started by torchrun: one clip by several processes, a GPU each."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from rich.table import Table

from tilewise import __version__
from tilewise.pipelines.generation.clip_metadata import versions
from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.generation.stock_call import guidance_is_an_input
from tilewise.pipelines.loading.device import device_name, resolve_device
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.pipelines.parallel.ranks import Ranks
from tilewise.plugins.context_parallel.enable import check_denoiser
from tilewise.plugins.context_parallel.enable_cfg import check_cfg
from tilewise.plugins.context_parallel.ways import CFG, check_way
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.patching import denoisers_of
from tilewise.plugins.step_caches.support import why_not_divided
from tilewise.plugins.text_format import render
from tilewise.ui.cli.request import Request
from tilewise.ui.common.terminal import Terminal, say, standard_error


def notes_of(ranks: Ranks) -> Terminal:
    """Where progress and notes go: the first process shows them."""
    return standard_error() if ranks.first else Terminal(file=open(os.devnull, "w"))


def own_request(request: Request, ranks: Ranks) -> Request:
    """The request with the device of this process."""
    return dataclasses.replace(request, device=ranks.world.device(request.device))


def check_parallel(
    skeleton: Any, settings: GenerateSettings, request: Request, memory: MemoryOptions, ranks: Ranks
) -> None:
    """Raises ConfigError for what several processes cannot do together, and UnsupportedModelError for a model that they cannot
    share."""
    check_way(request.parallel)
    if ranks.count == 1:
        if request.parallel == CFG:
            raise ConfigError(
                "--parallel cfg divides guidance between processes, and there is one: start it with torchrun --nproc-per-node 2 "
                "-m tilewise …"
            )
        return
    for name, asked, why in (
        ("--compare", request.compare, "times both clips in one process"),
        ("--offload", memory.offload != "none", "moves weights while other processes wait for an exchange"),
        ("--retry-oom", memory.retry_oom, "would begin again in one process while the others go on"),
        (
            "--add",
            settings.method.add is not None,
            "changes forwards of whole sequences",
        ),
    ):
        if asked:
            raise ConfigError(f"{name} cannot be used with {ranks.count} processes: it {why}. Leave it out")
    cfg, parts = request.parallel == CFG, ranks.parts(request.parallel)
    if cfg and (settings.guidance <= 1 or guidance_is_an_input(skeleton)):
        why = (
            f"guidance {settings.guidance:g} is off"
            if settings.guidance <= 1
            else "the model takes guidance as an input"
        )
        raise ConfigError(
            f"--parallel cfg: {why}, so that each step has one forward, which cannot be divided by branches of guidance. Leave "
            "--parallel out: the processes split the tokens then"
        )
    for name, denoiser in denoisers_of(skeleton).items():
        (check_cfg if cfg else check_denoiser)(name, denoiser, ranks.count)
        if (
            why_not := why_not_divided(settings.method.step_cache, denoiser, tokens=parts > 1, guidance=cfg)
        ) is not None:
            raise ConfigError(
                f"--cache cannot be used with {ranks.count} processes: {name} is a model {why_not}. Leave it out"
            )


def refuse_parallel(request: Request, ranks: Ranks) -> None:
    """Raises ConfigError for a stream or two stages by several processes."""
    for name in ("stream", "highres"):
        if ranks.count > 1 and request.options.get(name):
            raise ConfigError(
                f"--{name} is made by one process, and torchrun started {ranks.count}: start it without torchrun, or leave "
                f"--{name} out"
            )


def shares_of(result: Any, ranks: Ranks) -> list[dict[str, Any]]:
    """What each process did in the attention calls of a clip, by process; empty for one alone."""
    if ranks.count == 1:
        return []
    summary = result.summary
    return ranks.all(
        {
            "part": ", ".join(f"{row.denoiser} {row.part}" for row in summary.ranks),
            "density": summary.density,
            "attention": sum(row.seconds for row in summary.rows),
            "exchange": sum(row.seconds for row in summary.ranks),
        }
    )


def print_shares(shares: list[dict[str, Any]]) -> None:
    """A table of ``shares_of``, with how evenly the work was divided."""
    if not shares:
        return
    table = Table("process", "part", "density", "attention, s", "exchanges, s", title="processes")
    for rank, share in enumerate(shares):
        numbers = f"{share['density']:.3f}", f"{share['attention']:.2f}", f"{share['exchange']:.2f}"
        table.add_row(str(rank), share["part"], *numbers)
    attention = [share["attention"] for share in shares]
    mean = sum(attention) / len(attention)
    say(render(table))
    say(f"attention of the slowest process: {max(attention) / mean if mean else 1:.2f} times the mean")


def facts_of(settings: GenerateSettings, dtype: str, request: Request) -> dict[str, Any]:
    """What processes must have in common to make one clip."""
    device = resolve_device(request.device)
    return {
        "tilewise": __version__,
        **{name: version for name, version in versions().items() if name != "python"},
        "device": device_name(device),
        "dtype": dtype,
        "parallel": request.parallel,
        **settings.to_dict(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
