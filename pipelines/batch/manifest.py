"""The manifest of a batch: one JSON line per clip that was made or failed, in the folder of the clips.

    {"manifest": 1, "status": "done", "file": …, "bytes": …, "sha256": …, <the clip's metadata>}
    {"manifest": 1, "status": "failed", "error": …, <the same, without how the run went>}

A line is written only after its clip is whole on disk, and is on disk itself before the next clip begins. With several
processes each appends to a shard of its own (manifest.rank-00001.jsonl); `merge` joins the shards into manifest.jsonl. Of
several lines about one key the last counts, but a failure never takes the place of a clip that was made.

A line that cannot be read is left out, and said; `merge` keeps it aside in manifest.damaged.txt. Its clip tells by its own
metadata what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tilewise.pipelines.media.files import write_text
from tilewise.plugins.errors import ConfigError

FORMAT = 1
NAME = "manifest.jsonl"
DAMAGED = "manifest.damaged.txt"
SHARD = re.compile(r"manifest\.rank-\d{5}\.jsonl")

Line: TypeAlias = dict[str, Any]
Note: TypeAlias = Callable[[str], None]


class ManifestError(ConfigError):
    """A manifest that cannot be read, or is of a later format; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Content:
    """Of one manifest or shard. damaged: (number from 1, bytes, what is wrong) of lines that cannot be read. torn: whether the
    last line is cut off, or lacks its end; a line that is cut off is in neither list."""

    path: Path
    lines: list[Line]
    damaged: list[tuple[int, bytes, str]]
    torn: bool = False

    def tell(self, note: Note, where: str = "") -> None:
        for number, _, reason in self.damaged:
            note(f"{self.path}, line {number} is damaged ({reason}) and left out{where}")


def shard_path(folder: Path, rank: int, world_size: int) -> Path:
    """Where a process writes its lines: alone, into the manifest itself."""
    return folder / (NAME if world_size == 1 else f"manifest.rank-{rank:05d}.jsonl")


def key_of(line: Mapping[str, Any]) -> str:
    """The key of the job that a line is about."""
    return line["run"]["batch"]["key"]


def read_manifest(folder: Path, note: Note = lambda text: None) -> dict[str, Line]:
    """What a folder's manifest says, shards included: the line that counts, by key. Empty if there is none.

    A last line that is torn (the machine stopped in mid-write) is left out, and so is one that is damaged, which `note` is told.
    Raises ManifestError for a manifest that cannot be read, or of a later format.
    """
    # Shards first: while another process merges, their lines are for a moment in both places, never in neither.
    shards = [read_lines(path) for path in _shards(folder)]
    contents = [read_lines(folder / NAME), *shards]
    for content in contents:
        content.tell(note)
    return _counting(content.lines for content in contents)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line and has it on disk when it returns. If that fails the file is as it was, and OSError is raised."""
    data = (json.dumps(line, allow_nan=False) + "\n").encode()
    new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and not _ends_with_newline(path):  # a line that was cut off takes no other with it
            data = b"\n" + data
        try:
            done = 0
            while done < len(data):
                done += os.write(handle, data[done:])
            os.fsync(handle)
        except BaseException:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)
    if new:
        _sync_folder(path.parent)


def merge(folder: Path, note: Note = lambda text: None) -> None:
    """Joins shards into the manifest, mends a torn end and puts damaged lines aside. Only for whoever is alone in the folder.

    Safe against a stop at any point: the joined manifest is whole on disk before the shards go. note: told of damaged lines.
    """
    path = folder / NAME
    shards = _shards(folder)
    contents = [read_lines(one) for one in (path, *shards)]
    found = _counting(content.lines for content in contents)
    damaged = [data for content in contents for _, data, _ in content.damaged]
    if damaged:
        with (folder / DAMAGED).open("ab") as aside:
            aside.writelines(data + b"\n" for data in damaged)
            aside.flush()
            os.fsync(aside.fileno())
        for content in contents:
            content.tell(note, f"; it is kept in {folder / DAMAGED}")
    if contents[0].torn or shards or damaged or len(found) < len(contents[0].lines):
        write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in found.values()))
    for shard in shards:
        shard.unlink()


def read_lines(path: Path) -> Content:
    """The lines of one manifest or shard. Raises as `read_manifest`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Content(path, [], [])
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror or error}") from error
    pieces = data.split(b"\n")
    lines: list[Line] = []
    damaged: list[tuple[int, bytes, str]] = []
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            lines.append(_checked(json.loads(piece)))
        except ManifestError as error:
            raise ManifestError(f"{path}, line {number}: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(pieces):  # without an end
                return Content(path, lines, damaged, torn=True)
            damaged.append((number, piece, f"{type(error).__name__}: {error}"[:80]))
    return Content(path, lines, damaged, torn=not data.endswith(b"\n") and bool(data))


def spent(line: Mapping[str, Any], phase: str) -> float:
    """Seconds of a phase ("denoise", "total") of making a clip: of both stages, where there were two."""
    stages = line["run"].get("highres")
    return line["run"]["seconds"][phase] + (0.0 if stages is None else stages["native"]["seconds"][phase])


def is_whole(folder: Path, line: Mapping[str, Any]) -> bool:
    """Whether the clip of a line is there as it was written, by its length and SHA-256."""
    path = clip_path(folder, line)
    if path is None or not path.is_file() or path.stat().st_size != line["bytes"]:
        return False
    return sha256(path) == line["sha256"]


def clip_path(folder: Path, line: Mapping[str, Any]) -> Path | None:
    """Where a line's clip lies; None for a failed job, or for a name that leads out of the folder."""
    name = line.get("file")
    return folder / name if isinstance(name, str) and name == Path(name).name else None


def sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def done_line(path: Path, metadata: Mapping[str, Any]) -> Line:
    """The line for a clip that is whole on disk."""
    file = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return {"manifest": FORMAT, "status": "done", **file, **metadata}


def failed_line(metadata: Mapping[str, Any], error: BaseException) -> Line:
    """The line for a job that failed."""
    message = f"{type(error).__name__}: {error}"[:2000]
    return {"manifest": FORMAT, "status": "failed", "error": message, **metadata}


def _checked(line: Any) -> Line:
    """The line if it is one; KeyError, TypeError or ValueError if not."""
    version = line["manifest"]
    if isinstance(version, int) and version > FORMAT:
        raise ManifestError(
            f"format {version} is of a later tilewise; this one knows {FORMAT}. Update it, or give another --out folder"
        )
    done = line["status"] == "done"
    needed = ("tilewise", *(("file", "bytes", "sha256") if done else ()))
    if not isinstance(key_of(line), str) or not all(name in line for name in needed):
        raise ValueError("incomplete")
    return line


def _counting(parts: Iterable[Iterable[Line]]) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for part in parts:
        for line in part:
            key = key_of(line)
            if line["status"] != "done" and found.get(key, line)["status"] == "done":
                continue
            found.pop(key, None)  # so that the order is that of the lines that count
            found[key] = line
    return found


def _shards(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))
    except FileNotFoundError:
        return []


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
