"""From input lines to jobs: lines × sweep × seeds, resolved against the model and validated before weights are read.

A field may be given by the command, by the sweep and by the line. The line wins over the sweep, the sweep over the command;
window and density are one field in this: whoever gives one of them replaces both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.batch_input import KINDS, Problems, Row, parse_field
from tilewise.pipelines.errors import SetupError
from tilewise.pipelines.estimate import denoising_flop
from tilewise.pipelines.generate import call_arguments
from tilewise.pipelines.job import Job, merge_equal
from tilewise.pipelines.settings import MAX_SEED, GenerateSettings, explain_settings, resolve_settings
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError, TilewiseError, unknown
from tilewise.plugins.explain import Explanation

MAX_JOBS = 100_000  # the file names count in five digits
SHAPING = ("model", "method", "window", "density", "height", "width", "frames", "steps", "fps", "max_sequence_length")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What jobs are resolved with. config: the config of (method, window, density). skeleton, revision: of a model's name.
    dtype: the name of the dtype that "auto" or another name stands for here."""

    config: Callable[[Any, str | None, float | None], Config]
    skeleton: Callable[[str], Any]
    revision: Callable[[str], str]
    dtype: Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """jobs: in order, without repetition. explanations: of each distinct (model, size, method), with its number of jobs.
    notes: what was left out or joined, for the user."""

    jobs: list[Job]
    explanations: list[tuple[Explanation, GenerateSettings, int]]
    notes: list[str]


def parse_seeds(text: str) -> list[int]:
    """Seeds from "7", "0-9" or "0-3,7", in that order. Raises ConfigError for anything else, and for a seed given twice."""
    seeds: list[int] = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,19})(?:\s*-\s*(\d{1,19}))?\s*", word)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if low > high or high > MAX_SEED:
            raise ConfigError(f"--seeds takes numbers and ranges such as 0-9 or 0-3,7, not {word.strip()[:80]!r}")
        if high - low >= MAX_JOBS:
            raise ConfigError(
                f"--seeds {word.strip()} is {high - low + 1:,} seeds; a batch has at most {MAX_JOBS:,} clips"
            )
        seeds += range(low, high + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text[:80]} names a seed twice")
    return seeds


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields with the values that they take in turn, from "method=dense,sta" or "window=3,3,3;1,5,5".

    Values are separated by semicolons if there are any (or for window, whose values have commas), else by commas.
    Raises ConfigError for a text without values, an unknown field, or one that cannot be swept.
    """
    sweep: dict[str, list[Any]] = {}
    valid = [name for name in KINDS if name not in ("id", "prompt", "seed")]
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name in ("seed", "seeds"):
            raise ConfigError("seeds are swept by --seeds, such as --seeds 0-9")
        if not equals or name not in valid:
            raise unknown("field of --sweep FIELD=VALUE,VALUE:", name[:80], valid)
        if name in sweep:
            raise ConfigError(f"--sweep {name} is given twice; list all its values in one")
        words = [word.strip() for word in values.split(";" if ";" in values or name == "window" else ",")]
        if not all(words) or len(set(words)) < len(words):
            raise ConfigError(f"--sweep {name} takes different values separated by commas, not {values[:80]!r}")
        sweep[name] = [parse_field(name, word, text=True) for word in words]
    return sweep


def make_jobs(
    path: Path,
    rows: Sequence[Row],
    tools: Tools,
    *,
    command: Mapping[str, Any],
    sweep: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0,),
) -> Plan:
    """The jobs of a batch, in the order of rows, then sweep, then seeds.

    command: fields for every row that the row and the sweep do not give; None is not given.
    Raises InputError with every line that cannot be, SetupError for a model that is not there.
    """
    resolver = _Resolver(tools)
    problems = Problems(path)
    base = {name: value for name, value in command.items() if value is not None}
    combinations = [
        dict(zip(sweep or {}, values, strict=True)) for values in itertools.product(*(sweep or {}).values())
    ]
    total = sum(len(combinations) * (1 if "seed" in row.fields else len(seeds)) for row in rows)
    if total > MAX_JOBS:
        raise ConfigError(f"lines x sweep x seeds are {total:,} clips; a batch has at most {MAX_JOBS:,}")
    jobs: list[Job] = []
    ignored = False
    for row in rows:
        for swept in combinations:
            fields, left_out = _join(base, swept, row.fields)
            ignored |= left_out
            try:
                shape = resolver.shape(fields)
                for seed in [fields["seed"]] if "seed" in fields else seeds:
                    jobs.append(_job(len(jobs), row, shape, fields, seed, tools))
            except ConfigError as error:
                problems.add(row.line, error)
            except SetupError as error:
                raise type(error)(f"{path}, line {row.line}: {error}") from error
            except TilewiseError as error:
                raise type(error)(f"{path}, line {row.line}: {error}") from error
    problems.refuse()
    distinct = merge_equal(jobs)
    notes = ["the command's window and density are not used where the method is dense"] if ignored else []
    if len(distinct) < len(jobs):
        notes.append(f"{len(jobs) - len(distinct)} of {len(jobs)} jobs ask for the same as others, and are made once")
    return Plan(distinct, resolver.explanations(distinct), notes)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What jobs share that differ in prompt and seed only: resolved and explained once."""

    settings: GenerateSettings
    explanation: Explanation
    flop: float


class _Resolver:
    """Resolves each combination of model, method and size once: explaining one may take a second, and jobs are many."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.shapes: dict[str, _Shape | ConfigError] = {}

    def shape(self, fields: Mapping[str, Any]) -> _Shape:
        given = {name: fields[name] for name in SHAPING if name in fields}
        given["guided"] = fields.get("guidance")
        token = json.dumps(given, sort_keys=True)
        if token not in self.shapes:
            try:
                self.shapes[token] = self._resolve(fields)
            except ConfigError as error:
                self.shapes[token] = error
        found = self.shapes[token]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _resolve(self, fields: Mapping[str, Any]) -> _Shape:
        config = self.tools.config(fields["method"], fields.get("window"), fields.get("density"))
        skeleton = self.tools.skeleton(fields["model"])
        names = ("model", "height", "width", "frames", "steps", "guidance", "fps", "max_sequence_length")
        settings = resolve_settings(skeleton, "?", method=config, **{n: fields[n] for n in names if n in fields})
        call_arguments(skeleton, settings)
        explanation = explain_settings(skeleton, settings)
        return _Shape(settings, explanation, denoising_flop(skeleton, settings, explanation))

    def explanations(self, jobs: Sequence[Job]) -> list[tuple[Explanation, GenerateSettings, int]]:
        def token(settings: GenerateSettings) -> str:
            alike = dataclasses.replace(settings, prompt="?", negative="", seed=0, guidance=1.0)
            return json.dumps(alike.to_dict(), sort_keys=True)

        found: dict[str, tuple[Explanation, GenerateSettings, int]] = {}
        for shape in self.shapes.values():
            if isinstance(shape, _Shape):
                found.setdefault(token(shape.settings), (shape.explanation, shape.settings, 0))
        for job in jobs:
            name = token(job.settings)
            explanation, settings, count = found[name]
            found[name] = (explanation, settings, count + 1)
        return [entry for entry in found.values() if entry[2]]


def _join(command: Mapping[str, Any], swept: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The fields in force, and whether the command's window or density was left out because the method is dense."""
    fields: dict[str, Any] = {}
    for level in (command, swept, row):
        if "window" in level or "density" in level:
            fields.pop("window", None), fields.pop("density", None)
        fields |= level
    # In `--sweep method=dense,sta --density 0.3` the density is meant for those that have one.
    left_out = False
    if fields["method"] == "dense" and not {"window", "density"} & row.keys() and command.get("method") != "dense":
        left_out = any(fields.pop(name, None) is not None for name in ("window", "density"))
    return fields, left_out


def _job(index: int, row: Row, shape: _Shape, fields: Mapping[str, Any], seed: int, tools: Tools) -> Job:
    settings = dataclasses.replace(
        shape.settings, prompt=fields["prompt"], negative=fields.get("negative", ""), seed=seed
    )
    dtype = tools.dtype(fields.get("dtype", "auto"))
    revision = tools.revision(fields["model"])
    ids = (fields["id"],) if "id" in fields else ()
    return Job(index, (row.line,), ids, settings, dtype, revision, shape.flop)
