"""`tilewise tune`: which backends, tiles and lengths are fastest on this machine, measured and remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from tilewise.pipelines.errors import DeviceError
from tilewise.pipelines.generation.settings import DEFAULT_MODEL
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.loading.model_defaults import model_defaults
from tilewise.pipelines.media.files import check_writable
from tilewise.pipelines.memory.units import gib
from tilewise.pipelines.tuning.shapes import Shape, shapes_of_model
from tilewise.pipelines.tuning.tune import Findings, nothing_runs, tune
from tilewise.plugins.config import Config, resolve
from tilewise.plugins.errors import ConfigError, TilewiseError
from tilewise.plugins.models.common.family import Size
from tilewise.plugins.tuning.record import device_title, file_of, remove, write
from tilewise.ui.common.terminal import say, standard_error, standard_output

METHODS = ("sta-balanced", "draft-balanced")
BY_OTHERS = 1 << 30  # bytes of a GPU that others hold, from which on it is said


@dataclasses.dataclass(frozen=True)
class TuneRequest:
    """What the command line said. options: those of a clip that were given, by name."""

    options: Mapping[str, Any]
    shapes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    device: str = "auto"
    seconds: float = 0.3
    max_spread: float = 0.3
    reset: bool = False
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """A checked request."""

    device: torch.device
    dtype: torch.dtype
    shapes: list[Shape]
    configs: list[Config]


def tune_request(request: TuneRequest) -> None:
    """Times, prints, and writes the file of the device, or removes it.

    Raises TilewiseError where the times differ too much to go by, and nothing was written.
    """
    if request.reset:
        device = resolve_device(request.device)
        gone = remove(device)
        say(f"nothing was tuned on {device_title(device)}" if gone is None else f"removed {gone}")
        return
    work = _check(request)
    names = ", ".join(dict.fromkeys(config.method.name for config in work.configs))
    if request.dry_run:
        say(
            f"on {device_title(work.device)}, {str(work.dtype).removeprefix('torch.')}: {names} and every backend, over"
        )
        for shape in work.shapes:
            say(f"  {shape}, {shape.grid.tokens:,} tokens")
        say(f"would write {file_of(work.device)}")
        return
    check_writable(file_of(work.device), suffix=".json")  # before minutes of timing
    notes = standard_error()
    if (held := _held_by_others(work.device)) > BY_OTHERS:
        notes.note(f"other programs hold {gib(held)} of this GPU: what is measured beside them may be wrong")
    with notes.status("tuning …") as status:
        found = tune(
            work.shapes, work.configs, work.device, work.dtype, request.seconds, lambda what: status.update(what)
        )
    _print(found)
    for note in dict.fromkeys(found.notes):
        notes.note(note)
    spread = found.tuned.spread
    say(f"runs of one call differed by up to {spread:.0%}")
    if spread > request.max_spread:
        raise TilewiseError(
            f"tune: the times differ by more than {request.max_spread:.0%}, so nothing was saved. Does another program use "
            f"{device_title(work.device)}? Run it again when it is alone, for longer (--seconds), or with a larger --max-spread"
        )
    file = write(found.tuned, work.device)
    say(f"wrote {file}; tilewise.patch goes by it from now on, and `tilewise tune --reset` removes it")


def _check(request: TuneRequest) -> Work:
    """Everything that can be wrong is found here, before anything is timed."""
    if request.seconds <= 0 or request.max_spread <= 0:
        raise ConfigError(
            f"tune: --seconds and --max-spread must be above 0, got {request.seconds} and {request.max_spread}"
        )
    device = resolve_device(request.device)
    if why := nothing_runs(device):
        raise DeviceError(f"tune: attention is dense on {device_title(device)}, there is nothing to tune. {why}")
    configs = []
    for name in request.methods or METHODS:
        config = resolve(name)
        if config.is_stock or config.method.name == "dense":
            raise ConfigError(f"tune: --method {name} is dense, there is nothing to time")
        own = {"min_tokens": 0} if "min_tokens" in config.option_types else {}
        configs.append(config.with_options(own))
    if len({config.method.name for config in configs}) < len(configs):
        raise ConfigError("tune: give each method once: from which length on it pays is kept by its name")
    if request.shapes:
        if request.options:
            given = ", ".join(f"--{name}" for name in request.options)
            raise ConfigError(f"tune: give --shape, or a model and a size, not both: got {given}")
        shapes = [Shape.parse(text) for text in request.shapes]
    else:
        pipe = load_skeleton(request.options.get("model", DEFAULT_MODEL))
        usual = model_defaults(pipe)
        size = Size(*(request.options.get(name, getattr(usual, name)) for name in ("height", "width", "frames")))
        shapes, configs = shapes_of_model(pipe, size, configs)
    return Work(device, resolve_dtype("auto", device), shapes, configs)


def _held_by_others(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _print(found: Findings) -> None:
    table = Table("what", "which", "attention", "blocks", "ms", "spread", "× stock", title="on this machine")
    best = {
        (row.shape, row.plan): min(
            other.ms for other in found.rows if (other.shape, other.plan) == (row.shape, row.plan) and not other.wrong
        )
        for row in found.rows
        if row.what in ("backend", "tile") and not row.wrong
    }
    for row in found.rows:
        mark = " (fastest)" if row.what in ("backend", "tile") and best.get((row.shape, row.plan)) == row.ms else ""
        table.add_row(
            row.what, row.name + mark, row.shape, row.plan, f"{row.ms:.3f}", f"{row.spread:.0%}",
            row.wrong or f"{row.over_stock:.2f}",
        )  # fmt: skip
    standard_output().print(table)
    for method, tokens in found.tuned.least.items():
        longest = max(row.tokens for row in found.rows)
        if tokens > longest:
            say(f"{method} was not faster than stock up to {longest:,} tokens: calls of up to so many stay dense")
        else:
            say(f"{method} pays from {tokens:,} tokens on")
