"""Read the input of a batch, one clip per line. Parsing is strict, and all mistakes are reported with their line numbers.

.txt: a prompt a line; empty lines and lines that begin with # are skipped.
.csv: a header with the names of fields, then a clip a row; an empty cell is a field that is not given.
.jsonl: a JSON object a line. This is the canonical form: every field has its own type, and `method` may be a config object.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewise.pipelines.generation.method_options import PREFIX, SET, field_name
from tilewise.pipelines.generation.settings import CLIP_OPTIONS, GenerateSettings, check_text
from tilewise.pipelines.highres.settings import HIGHRES, TWO_STAGE_OPTIONS
from tilewise.pipelines.options import Option, options_of
from tilewise.pipelines.streaming.settings import STREAM, STREAM_OPTIONS
from tilewise.plugins.errors import ConfigError, unknown

FIELDS = {
    "id": Option("id", "text", "A name for the clip."),
    "prompt": options_of(GenerateSettings)["prompt"],
    **{name: one for name, one in CLIP_OPTIONS.items() if one is not SET},
    HIGHRES.name: HIGHRES,
    **TWO_STAGE_OPTIONS,
    STREAM.name: STREAM,
    **STREAM_OPTIONS,
}
"""The columns of the input, beside "set.NAME" for options of methods (`method_options`)."""
# Words of the command that no line can have.
WHOLE_BATCH = ("out", "device", "compare", "dry_run", "seeds", "sweep", "offload", "vae_tiling", "retry_oom")
MAX_ID = 200
MAX_OPTION = 10_000
DELIMITERS = (",", ";", "\t", "|")  # of CSV files: spreadsheets write the second where the comma is for decimals
SHOWN = 50  # problems and line numbers that a message lists before it only counts


class InputError(ConfigError):
    """Lines of a batch's input that cannot be; the message lists all of them with their line numbers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the input. line: its number from 1 (of the row's first line, if a cell spans several)."""

    line: int
    fields: dict[str, Any]


class Problems:
    """Mistakes collected by line, so that one run tells about all of them. The same mistake in many lines is told once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[int]] = {}

    def add(self, line: int, error: object) -> None:
        lines = self.found.setdefault(str(error), [])
        if line not in lines[-1:]:
            lines.append(line)

    def refuse(self) -> None:
        """Raises InputError if there are any."""
        if not self.found:
            return
        told = [
            f"  {lines_words(lines)}: {text}" for text, lines in sorted(self.found.items(), key=lambda item: item[1])
        ]
        if len(told) > SHOWN:
            told[SHOWN:] = [f"  and {len(told) - SHOWN} more kinds of mistakes"]
        raise InputError("\n".join([f"{self.path} cannot be used; nothing was done:", *told]))


def read_rows(path: str | Path) -> list[Row]:
    """The lines of an input file. Raises as `read_input`, and InputError for lines that cannot be, all mistakes at once."""
    rows, problems = read_input(path)
    problems.refuse()
    return rows


def read_input(path: str | Path) -> tuple[list[Row], Problems]:
    """The good lines of an input file, and what is wrong with the others: encoding, malformed lines, unknown fields, values of
    the wrong kind, repeated ids.

    Raises InputError for another suffix and a file without any prompt, ConfigError for one that cannot be read.
    """
    path = Path(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"the input {path} must be one of {', '.join(readers)}: the suffix says how it is read")
    problems = Problems(path)
    try:
        lines = list(_decoded(path.read_bytes(), problems))
    except OSError as error:
        raise ConfigError(f"cannot read the input {path}: {error.strerror or error}") from error
    rows = list(reader(lines, problems))
    _check_ids(rows, problems)
    if not rows and not problems.found:
        raise InputError(f"{path} holds no prompts: one a line is wanted")
    return rows, problems


def parse_field(name: str, value: Any, *, text: bool) -> Any:
    """A field's value in its own type; with `text`, from words as in a table's cell. Raises ConfigError."""
    if name.startswith(PREFIX):
        return _parse_method_option(name, value)
    if name not in FIELDS:
        if name.replace("-", "_") in WHOLE_BATCH:
            raise ConfigError(f"{name!r} is for the whole batch: give --{name.replace('_', '-')} to the command")
        if name == SET.name:
            raise ConfigError(
                f"{name!r} takes a name: {PREFIX}recall for the option recall of the method, for instance"
            )
        raise unknown("field", name[:80], FIELDS)
    value = FIELDS[name].parse(value, text=text)
    if FIELDS[name].kind == "text":
        check_text(name, value)
    if name == "prompt" and not value.strip():
        raise ConfigError("the prompt is empty: say what the clip should show")
    if name == "id" and not (value.strip() and len(value) <= MAX_ID):
        raise ConfigError(f"an id has 1 to {MAX_ID} characters, not {len(value.strip())}")
    return value


def column(name: str) -> str:
    """The field that a column or a sweep sets: "set.density" and "density" are one."""
    name = name.strip()
    return field_name(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name


def is_column(name: str) -> bool:
    return name in FIELDS or (name.startswith(PREFIX) and len(name) > len(PREFIX))


def _parse_method_option(name: str, value: Any) -> Any:
    """An option of a method is read once the method is known. Raises ConfigError for what can be none, such as an empty one."""
    if value == "" or len(json.dumps(value)) > MAX_OPTION:
        raise ConfigError(f"{name[:80]} must be a value of at most {MAX_OPTION:,} characters")
    return value


def _decoded(data: bytes, problems: Problems) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield number, line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            problems.add(number, f"not UTF-8 (byte 0x{byte:02x} at position {error.start + 1}); save the file as UTF-8")


def _read_txt(lines: list[tuple[int, str]], problems: Problems) -> Iterator[Row]:
    for number, line in lines:
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield from _row(number, {"prompt": prompt}, problems, text=True)


def _read_csv(lines: list[tuple[int, str]], problems: Problems) -> Iterator[Row]:
    texts = [text + "\n" for _, text in lines]
    delimiter = _delimiter(texts)
    header: list[str] | None = None
    start = malformed = 0
    while start < len(texts) and malformed < SHOWN:
        table = csv.reader(itertools.islice(texts, start, None), strict=True, delimiter=delimiter)
        first = start
        try:
            for cells in table:
                number, first = lines[first][0], start + table.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = [column(cell) for cell in cells]
                    if not _readable_header(header, number, problems):
                        return
                elif len(cells) != len(header):
                    words = f"{len(cells)} cells where the header has {len(header)}, separated by {delimiter!r}"
                    problems.add(number, f"{words}; quote cells that hold one")
                else:
                    named = zip(header, cells, strict=True)
                    fields = {name: cell.strip() for name, cell in named if cell.strip() and is_column(name)}
                    yield from _row(number, fields, problems, text=True)
            return
        except csv.Error as error:  # where this row ends cannot be known: the next line is taken for a new one
            problems.add(lines[first][0], f"malformed CSV: {error}")
            if header is None:
                return
            start, malformed = first + 1, malformed + 1


def _readable_header(header: list[str], number: int, problems: Problems) -> bool:
    """Whether the rows below can be read: not under a header without prompts, or with a field twice."""
    for name in header:
        if not is_column(name) or header.count(name) > 1:
            problems.add(number, f"the header names {name!r} twice" if is_column(name) else _why_not(name))
    if "prompt" not in header:
        named = " ".join("a tab" if one == "\t" else one for one in DELIMITERS)
        problems.add(
            number, f"the header (the first row) has no column 'prompt'; cells are separated by one of {named}"
        )
    return "prompt" in header and not any(header.count(name) > 1 for name in header if is_column(name))


def _delimiter(texts: Sequence[str]) -> str:
    """What separates the cells: that of DELIMITERS by which the header has the most columns that there are."""
    header = next((text for text in texts if text.strip()), "")
    if len(header) > csv.field_size_limit():
        return DELIMITERS[0]

    def known(delimiter: str) -> int:
        return sum(is_column(column(cell)) for cell in next(csv.reader([header], delimiter=delimiter), []))

    return max(DELIMITERS, key=known)


def _read_jsonl(lines: list[tuple[int, str]], problems: Problems) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_object, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            problems.add(number, f"malformed JSON: {str(error)[:200]}")
            continue
        if not isinstance(fields, dict):
            problems.add(number, f'a JSON object such as {{"prompt": "…"}} is wanted, not {type(fields).__name__}')
            continue
        if isinstance(fields.get("id"), int) and not isinstance(fields["id"], bool):
            fields["id"] = str(fields["id"])
        # null is "not given", as an empty cell is
        fields = {column(name): value for name, value in fields.items() if value is not None or not is_column(name)}
        yield from _row(number, fields, problems, text=False)


def _row(number: int, fields: Mapping[str, Any], problems: Problems, *, text: bool) -> Iterator[Row]:
    parsed, good = {}, True
    for name, value in fields.items():
        try:
            parsed[name] = parse_field(name, value, text=text)
        except ConfigError as error:
            problems.add(number, error)
            good = False
    if "prompt" not in fields:
        problems.add(number, "there is no prompt")
        good = False
    if good:
        yield Row(number, parsed)


def _check_ids(rows: list[Row], problems: Problems) -> None:
    first: dict[str, int] = {}
    for row in rows:
        name = row.fields.get("id")
        if name is not None and first.setdefault(name, row.line) != row.line:
            problems.add(row.line, f"the id {name!r} is taken by line {first[name]}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name[:80]!r} is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _why_not(name: str) -> str:
    try:
        parse_field(name, "", text=True)
    except ConfigError as error:
        return str(error)
    return f"cannot use {name!r}"


def lines_words(numbers: Sequence[int]) -> str:
    """Numbers of lines, for messages."""
    shown = ", ".join(map(str, numbers[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"{'line' if len(numbers) == 1 else 'lines'} {shown}{more}"
