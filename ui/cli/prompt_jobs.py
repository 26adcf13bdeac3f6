"""A file of prompts as the settings of one clip a line, all else from the command: what `verify` and `calibrate` run over."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch.input import Problems, Row, read_rows
from tilewise.pipelines.generation.kept_results import KeptResults
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.generation.settings import DEFAULT_MODEL, GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.loading.device import resolve_device, resolve_dtype
from tilewise.pipelines.loading.load import load_skeleton
from tilewise.pipelines.memory.fit import check_fit
from tilewise.pipelines.memory.options import MemoryOptions, check_memory, memory_options
from tilewise.pipelines.options import options_of
from tilewise.plugins.config import Config
from tilewise.plugins.text_format import counted
from tilewise.ui.common.terminal import Terminal

OF_A_LINE = ("prompt", "negative", "seed")


@dataclasses.dataclass(frozen=True)
class PromptJobs:
    """A job a line. skeleton: the pipeline without weights."""

    skeleton: Any
    jobs: list[GenerateSettings]
    device: torch.device
    dtype: str
    memory: MemoryOptions


def prompt_jobs(prompts: Path, options: Mapping[str, Any], config: Config, device: str) -> PromptJobs:
    """Everything that can be wrong is found here, before weights are read. options: of the command, by name.

    Raises:
        InputError: the file cannot be read, or has lines that say the same or something else than OF_A_LINE.
        ConfigError: options that do not fit each other, the model or the memory.
    """
    given = {name: options[name] for name in options_of(GenerateSettings) if name in options}
    given |= {"method": config, "model": options.get("model", DEFAULT_MODEL)}
    rows = read_rows(prompts)
    _check_rows(prompts, rows, given)
    skeleton = load_skeleton(given["model"])
    first = resolve_settings(skeleton, **{**given, **rows[0].fields})
    jobs = [dataclasses.replace(first, **_of_line(row, first)) for row in rows]
    call_arguments(skeleton, first)
    where = resolve_device(device)
    dtype = str(resolve_dtype(options.get("dtype", "auto"), where)).removeprefix("torch.")
    memory = memory_options(options, None)
    check_memory(skeleton, memory, where)
    check_fit(skeleton, first, explain_settings(skeleton, first), getattr(torch, dtype), where, memory)
    return PromptJobs(skeleton, jobs, where, dtype, memory)


@contextlib.contextmanager
def telling_what_is_kept(
    notes: Terminal, kept: KeptResults, jobs: Sequence[GenerateSettings], result: str
) -> Iterator[None]:
    """Whatever ends the work early, a note says how many results there are and where they are. result: what one is called."""
    try:
        yield
    except BaseException:
        if done := kept.count(jobs):
            notes.note(f"{done} of {counted(len(jobs), result)} kept in {kept.folder}: the same command goes on there")
        raise


def _of_line(row: Row, first: GenerateSettings) -> dict[str, Any]:
    """What a line says in place of the command's."""
    return {name: row.fields.get(name, getattr(first, name)) for name in OF_A_LINE}


def _check_rows(path: Path, rows: list[Row], given: dict[str, Any]) -> None:
    """Raises InputError for fields that all pairs share, and for lines that say the same."""
    problems = Problems(path)
    seen: dict[tuple[Any, ...], int] = {}
    for row in rows:
        for name in row.fields:
            if name not in OF_A_LINE:
                problems.add(row.line, f"{name!r} is the same for all lines: give it to the command")
        told = tuple(row.fields.get(name, given.get(name)) for name in OF_A_LINE)
        if told in seen:
            problems.add(row.line, f"says the same as line {seen[told]}")
        seen.setdefault(told, row.line)
    problems.refuse()
