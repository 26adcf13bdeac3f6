"""Turn input lines into jobs (lines × sweep × seeds), resolved against the model and validated before any weights are loaded.

A field may be given by the command, by the sweep and by the line. The line wins over the sweep, the sweep over the command;
window, density and recall are one field in this: whoever gives one of them replaces all. Clips of one stage and of two (highres)
and streams may be in one batch: what the command or the sweep says of another kind is not used, and a line that says it is
refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.pipelines.batch.estimate import denoising_flop, windows_flop
from tilewise.pipelines.batch.input import FIELDS, Problems, Row, column, parse_field
from tilewise.pipelines.batch.job import Job, Stages, merge_equal
from tilewise.pipelines.batch.stream_jobs import Streamed, plan_stream, stream_flop
from tilewise.pipelines.batch.two_stage_jobs import plan_fields, stages_flop, stages_of
from tilewise.pipelines.conditioning.files import ROLES
from tilewise.pipelines.errors import SetupError
from tilewise.pipelines.generation.method_options import EITHER, PREFIX, flag, is_method_option
from tilewise.pipelines.generation.resolve import explain_settings, resolve_settings
from tilewise.pipelines.generation.settings import MAX_SEED, RANDOM_SEED, GenerateSettings
from tilewise.pipelines.generation.stock_call import call_arguments
from tilewise.pipelines.highres.one_stage import METHOD, in_one_stage, refuse_stages
from tilewise.pipelines.highres.preparation import Work
from tilewise.pipelines.highres.settings import TWO_STAGE_OPTIONS
from tilewise.pipelines.memory.fit import check_fit
from tilewise.pipelines.memory.options import NOTHING_SAVED, MemoryOptions
from tilewise.pipelines.options import options_of
from tilewise.pipelines.streaming.explain import StreamExplanation
from tilewise.pipelines.streaming.preparation import check_negative
from tilewise.pipelines.streaming.settings import STREAM_OPTIONS, not_of_streams
from tilewise.pipelines.streaming.windows.explain import WindowExplanation
from tilewise.plugins.config import Config
from tilewise.plugins.errors import ConfigError, TilewiseError, unknown
from tilewise.plugins.explain import Explanation

MAX_JOBS = 100_000  # the file names count in five digits
NOT_SHAPING = ("id", "prompt", "negative", "seed")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What jobs are resolved with.

    config: of a method, with what the fields of a line say of it. skeleton, revision: of a model's name. dtype: the name of the
    dtype that "auto" or another name stands for here. device: where the clips will be made. memory: what of it
    may be saved.
    """

    config: Callable[[Any, Mapping[str, Any]], Config]
    skeleton: Callable[[str], Any]
    revision: Callable[[str], str]
    dtype: Callable[[str], str]
    device: torch.device
    memory: MemoryOptions = NOTHING_SAVED


@dataclasses.dataclass(frozen=True)
class Explained:
    """What would run for jobs of one model, size and method, and how many those are. work: for clips of two stages, how they are
    made. stream: for streams."""

    explanation: Explanation | StreamExplanation | WindowExplanation
    settings: GenerateSettings
    jobs: int
    work: Work | None = None
    stream: Streamed | None = None

    @property
    def stages(self) -> Stages | None:
        return None if self.work is None else stages_of(self.work)


@dataclasses.dataclass(frozen=True)
class Plan:
    """jobs: in order, without repetition. explanations: of each distinct (model, size, method). notes: what was left out or
    joined, for the user."""

    jobs: list[Job]
    explanations: list[Explained]
    notes: list[str]


def parse_seeds(text: str) -> list[int]:
    """Seeds from "7", "0-9" or "0-3,7", in that order. Raises ConfigError for anything else, and for a seed given twice."""
    seeds: list[int] = []
    if text.strip() == RANDOM_SEED:
        raise ConfigError(
            "--seeds takes numbers: a batch is resumed by its seeds, and random ones would be others in each run"
        )
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


WITH_COMMAS = (
    "window",
    "steps_sparse",
    f"{PREFIX}tile",
    f"{PREFIX}native",
    f"{PREFIX}stride",
    f"{PREFIX}dilation",
    f"{PREFIX}always",
)


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields with the values that they take in turn, from "method=dense,sta" or "window=3,3,3;1,5,5".

    Values are separated by semicolons if there are any (or for fields whose values have commas), else by commas.
    Raises ConfigError for a text without values, an unknown field, or one that cannot be swept.
    """
    sweep: dict[str, list[Any]] = {}
    valid = [name for name in FIELDS if name not in ("id", "prompt", "seed")]
    for text in texts:
        name, equals, values = text.partition("=")
        name = column(name.replace("-", "_"))
        if name in ("seed", "seeds"):
            raise ConfigError("seeds are swept by --seeds, such as --seeds 0-9")
        if not equals and name in valid:
            raise ConfigError(f"--sweep {name} needs values: --sweep {name}=VALUE,VALUE")
        if name in FIELDS and name not in valid:
            raise ConfigError(f"{name} cannot be swept: give one line of the input for each {name}")
        if not equals or not (name in valid or is_method_option(name)):
            raise unknown("field of --sweep FIELD=VALUE,VALUE:", name[:80], valid)
        if name in sweep:
            raise ConfigError(f"--sweep {name} is given twice; list all its values in one")
        words = [word.strip() for word in values.split(";" if ";" in values or name in WITH_COMMAS else ",")]
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
    usual_method: str = "dense",
    problems: Problems | None = None,
) -> Plan:
    """The jobs of a batch, in the order of rows, then sweep, then seeds.

    command: fields for every row that the row and the sweep do not give; None is not given. usual_method: where nobody gives
    one; the native stage of two is dense then. problems: what is wrong with other lines of the input, told with what is found
    here.
    Raises InputError with every line that cannot be, SetupError for a model that is not there.
    """
    resolver = _Resolver(tools)
    problems = problems or Problems(path)
    base = {name: value for name, value in command.items() if value is not None}
    combinations = [
        dict(zip(sweep or {}, values, strict=True)) for values in itertools.product(*(sweep or {}).values())
    ]
    total = sum(len(combinations) * (1 if "seed" in row.fields else len(seeds)) for row in rows)
    if total > MAX_JOBS:
        raise ConfigError(f"lines x sweep x seeds are {total:,} clips; a batch has at most {MAX_JOBS:,}")
    jobs: list[Job] = []
    ignored: dict[str, None] = {}
    without: dict[str, set[str]] = {}  # option of a method → methods of this batch that have none
    used: set[str] = set()
    for row in rows:
        for swept in combinations:
            try:
                fields, left_out = _join(base, swept, row.fields, usual_method)
                if fields.get("highres") and not any("method" in level for level in (base, swept, row.fields)):
                    fields["method"] = METHOD if in_one_stage(tools.skeleton(fields["model"])) else fields["method"]
                ignored |= dict.fromkeys(left_out)
                config = tools.config(fields["method"], {})
                for name in _leave_out(fields, base, row.fields, config):
                    without.setdefault(name, set()).add(config.method.name)
                used |= fields.keys()
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
    for name, methods in without.items():
        if name not in used:
            raise ConfigError(f"{flag(name)} is an option of none of the methods here: {', '.join(sorted(methods))}")
        ignored[f"{flag(name)} is not used where the method is {' or '.join(sorted(methods))}"] = None
    distinct = merge_equal(jobs)
    notes = list(ignored)
    if len(distinct) < len(jobs):
        notes.append(f"{len(jobs) - len(distinct)} of {len(jobs)} jobs ask for the same as others, and are made once")
    return Plan(distinct, resolver.explanations(distinct), notes)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What jobs share that differ in prompt and seed only: resolved and explained once."""

    settings: GenerateSettings
    explanation: Explanation | StreamExplanation | WindowExplanation
    flop: float
    work: Work | None = None
    stream: Streamed | None = None

    @property
    def stages(self) -> Stages | None:
        return None if self.work is None else stages_of(self.work)


class _Resolver:
    """Resolves each combination of model, method and size once: explaining one may take a second, and jobs are many."""

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.shapes: dict[str, _Shape | ConfigError] = {}

    def shape(self, fields: Mapping[str, Any]) -> _Shape:
        given = {name: value for name, value in fields.items() if name not in NOT_SHAPING}
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
        streams = fields.get("stream", False)
        of_method = {name: value for name, value in fields.items() if not (streams and name == "window")}
        config = self.tools.config(fields["method"], of_method)
        skeleton = self.tools.skeleton(fields["model"])
        if streams:
            dtype = self.tools.dtype(fields.get("dtype", "auto"))
            stream, told = plan_stream(skeleton, fields, method=config, dtype=dtype, device=self.tools.device)
            settings = stream.work.settings
            if isinstance(told, WindowExplanation):
                flop = windows_flop(skeleton, settings, told)
            else:
                flop = stream_flop(skeleton, stream, told)
            return _Shape(settings, told, flop, stream=stream)
        if fields.get("highres") and in_one_stage(skeleton):
            refuse_stages([name for name in TWO_STAGE_OPTIONS if name in fields], flags=True)
        elif fields.get("highres"):
            dtype = self.tools.dtype(fields.get("dtype", "auto"))
            work = plan_fields(skeleton, fields, method=config, dtype=dtype, device=self.tools.device)
            return _Shape(work.target, explain_settings(skeleton, work.target), stages_flop(skeleton, work), work)
        shaping = {
            name: fields[name] for name in options_of(GenerateSettings) if name in fields and name not in NOT_SHAPING
        }
        settings = resolve_settings(skeleton, "?", **{**shaping, "method": config})
        call_arguments(skeleton, settings)
        explanation = explain_settings(skeleton, settings)
        dtype = getattr(torch, self.tools.dtype(fields.get("dtype", "auto")))
        check_fit(skeleton, settings, explanation, dtype, self.tools.device, self.tools.memory)
        return _Shape(settings, explanation, denoising_flop(skeleton, settings, explanation))

    def explanations(self, jobs: Sequence[Job]) -> list[Explained]:
        def token(settings: GenerateSettings, stages: Stages | None, stream: Streamed | None) -> str:
            alike = dataclasses.replace(settings.of_any_content(), guidance=1.0)
            told = [alike.to_dict(), stages and stages.to_dict(), stream and stream.to_dict()]
            return json.dumps(told, sort_keys=True)

        counts = Counter(token(job.settings, job.highres, job.stream) for job in jobs)
        found: dict[str, Explained] = {}
        for shape in self.shapes.values():
            if isinstance(shape, _Shape):
                name = token(shape.settings, shape.stages, shape.stream)
                found.setdefault(
                    name, Explained(shape.explanation, shape.settings, counts[name], shape.work, shape.stream)
                )
        return [entry for entry in found.values() if entry.jobs]


def _join(
    command: Mapping[str, Any], swept: Mapping[str, Any], row: Mapping[str, Any], usual_method: str
) -> tuple[dict[str, Any], list[str]]:
    """The fields in force, and notes on what the command or the sweep gave that is not for this line.

    Raises ConfigError where the line itself gives what is not for it.
    """
    two, streams = ({**command, **swept, **row}.get(kind, False) for kind in ("highres", "stream"))
    if two and streams:
        raise ConfigError("highres and stream are two ways to make a clip: give one of them")
    either = [name for name in EITHER if not (streams and name == "window")]  # a stream's window counts latent frames
    fields: dict[str, Any] = {}
    for level in (command, swept, row):
        if any(name in level for name in either):
            for name in either:
                fields.pop(name, None)
        fields |= level
    fields.setdefault("method", "dense" if two or streams else usual_method)
    notes = []
    for kind, used, options in (("highres", two, TWO_STAGE_OPTIONS), ("stream", streams, STREAM_OPTIONS)):
        for name in () if used else options:
            if name in row:
                raise ConfigError(f"{name} is an option of {kind}: give {kind} as true too")
            if fields.pop(name, None) is not None:
                notes.append(f"the command's {name} is not used where {kind} is not")
    made_from = any(fields.get(role) for role in ROLES)
    if not (two or streams or made_from or "strength" in row) and fields.pop("strength", None) is not None:
        notes.append("the command's strength is not used where a clip is made from no file, nor by highres")
    for name, why in not_of_streams(fields).items() if streams else ():
        if name in row:
            raise ConfigError(f"{name} cannot be used with stream: {why}")
        if fields.pop(name, None) is not None:
            notes.append(f"the command's {name} is not used where stream is")
    return fields, notes


def _leave_out(fields: dict[str, Any], command: Mapping[str, Any], row: Mapping[str, Any], config: Config) -> list[str]:
    """Takes options out that the method of these fields has not, and that were meant for others; returns their names.

    In `--sweep method=dense,sta --density 0.3` the density is for those that have one. What the line gives, or the command
    beside the method, stays, and is refused.
    """
    if command.get("method") == fields["method"]:
        return []
    left_out = [
        name
        for name in fields
        if is_method_option(name)
        and name not in row
        and name.removeprefix(PREFIX) not in config.option_types
        and not (name == "window" and fields.get("stream"))
    ]
    for name in left_out:
        del fields[name]
    return left_out


def _job(index: int, row: Row, shape: _Shape, fields: Mapping[str, Any], seed: int, tools: Tools) -> Job:
    settings = dataclasses.replace(
        shape.settings, prompt=fields["prompt"], negative=fields.get("negative", ""), seed=seed
    )
    if shape.stream is not None:
        check_negative(shape.stream.work.recipe, settings.negative)
    dtype = tools.dtype(fields.get("dtype", "auto"))
    revision = tools.revision(fields["model"])
    ids = (fields["id"],) if "id" in fields else ()
    return Job(index, (row.line,), ids, settings, dtype, revision, shape.flop, shape.stages, shape.stream)
