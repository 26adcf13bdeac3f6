"""`tilewise generate` started by torchrun: one clip by several processes, a GPU each."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from rich.table import Table

from tilewise.pipelines.generation.settings import GenerateSettings
from tilewise.pipelines.loading.device import resolve_device
from tilewise.pipelines.memory.options import MemoryOptions
from tilewise.pipelines.parallel.checks import check_shared, check_way_for, machine_facts
from tilewise.pipelines.parallel.ranks import Ranks
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.text_format import render
from tilewise.ui.cli.request import Request
from tilewise.ui.common.terminal import Terminal, say, standard_error

BY_ONE = {
    "stream": "each chunk waits for the one before; --decode-device gives the decoder a GPU of its own",
    "highres": "the command plans memory and writes two clips for one; tilewise.highres in a script runs on several",
}


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
    check_way_for(request.parallel, ranks)
    if ranks.count == 1:
        return
    for name, asked, why in (
        ("--compare", request.compare, "times both clips in one process"),
        ("--offload", memory.offload != "none", "moves weights while other processes wait for an exchange"),
        ("--retry-oom", memory.retry_oom, "would begin again in one process while the others go on"),
    ):
        if asked:
            raise ConfigError(f"{name} cannot be used with {ranks.count} processes: it {why}. Leave it out")
    check_shared(skeleton, settings, ranks, request.parallel)


def refuse_parallel(request: Request, ranks: Ranks) -> None:
    """Raises ConfigError for a stream or two stages by several processes."""
    for name, why in BY_ONE.items():
        if ranks.count > 1 and request.options.get(name):
            raise ConfigError(
                f"--{name} is made by one process, and torchrun started {ranks.count}: {why}. Start it without torchrun, or "
                f"leave --{name} out"
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
    return {**machine_facts(resolve_device(request.device), dtype, request.parallel), **settings.to_dict()}
