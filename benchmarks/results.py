"""Result files: one a device and day, made of sections, made of rows with names.

A run replaces the rows that it measured and keeps the others, so that a table can be measured in parts. Files that come from
another machine are put into benchmarks/results by

    python -m benchmarks.results FILE …
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FORMAT = 2
IDENTITY = ("format", "device", "date", "tiny")


class MismatchError(Exception):
    """Results that must not stand in one file."""


def path_of(result: dict[str, Any], folder: Path) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return folder / f"{slug}-{result['date']}{'-tiny' if result['tiny'] else ''}.json"


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the rows of ``new`` put in their places.

    Raises:
        MismatchError: for another device, day or format, or other versions of the libraries.
    """
    different = [key for key in IDENTITY if old.get(key) != new.get(key)]
    versions = {**old.get("versions", {}), **new.get("versions", {})}
    different += [name for name, version in old.get("versions", {}).items() if versions[name] != version]
    if different:
        raise MismatchError(f"results differ in {', '.join(different)}: they cannot stand in one file")
    sections = {name: list(rows) for name, rows in old["sections"].items()}
    for name, rows in new["sections"].items():
        replaced = {row["name"] for row in rows}
        kept = [row for row in sections.get(name, []) if row["name"] not in replaced]
        sections[name] = sorted([*kept, *rows], key=lambda row: row["order"])
    commands = list(dict.fromkeys([*old["commands"], *new["commands"]]))
    return {**old, **new, "commands": commands, "versions": versions, "sections": sections}


def write(new: dict[str, Any], folder: Path) -> Path:
    """Put a result into its file in ``folder``, with what is there already.

    Raises:
        MismatchError: see ``merged``. The file is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(new, folder)
    result = new
    if path.exists():
        try:
            result = merged(json.loads(path.read_text(encoding="utf-8")), new)
        except MismatchError as error:
            raise MismatchError(f"{path}: {error}. Move that file away, or give another --out") from None
    waiting = path.with_suffix(".part")
    waiting.write_text(text_of(result), encoding="utf-8")
    waiting.replace(path)
    return path


def text_of(result: dict[str, Any]) -> str:
    """JSON with a row a line: half as long as with a number a line, and a changed row is a changed line."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    head = [f" {line(key)}: {line(value)}," for key, value in result.items() if key != "sections"]
    sections = []
    for name, rows in result["sections"].items():
        sections.append(f"  {line(name)}: [\n" + ",\n".join(f"   {line(row)}" for row in rows) + "\n  ]")
    return "\n".join(["{", *head, ' "sections": {', ",\n".join(sections), " }", "}", ""])


def main(files: list[str]) -> None:
    if not files:
        sys.exit("usage: python -m benchmarks.results FILE …")
    for file in files:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        if result.get("format") != FORMAT:
            sys.exit(f"{file}: format {result.get('format')}, this program reads {FORMAT}")
        try:
            print(write(result, FOLDER))
        except MismatchError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
