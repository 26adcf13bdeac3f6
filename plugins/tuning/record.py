"""What ``tilewise tune`` found, as a small JSON file: by chip and version, in the user's config folder.

    $XDG_CONFIG_HOME/tilewise/tuned-nvidia-geforce-rtx-4090.json        (~/.config where the variable is not set)

A file of another chip, or of other versions of the libraries that were timed, says nothing here: it is left alone and not used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilewise.kernels.attention.tuned import TunedKernels
from tilewise.kernels.chips import chip_of

FORMAT = 1
TIMED = ("tilewise", "torch", "triton")  # another version of these may be faster or slower
BYTES = 1 << 20  # of a file: what is longer was not written here


class UnusableError(Exception):
    """Why a file is not used."""


@dataclass(frozen=True)
class Tuned:
    """What was found on one device.

    Attributes:
        device: its name. chip: as kernels call it ("sm_89", "cpu"). versions: of the libraries that were timed.
        kernels: backends and tiles, the fastest first.
        least: method → tokens from which its attention was faster than stock.
        made: when, in UTC. spread: how far runs of one call differed, at most. rows: what was measured, for people to read.
    """

    device: str
    chip: str
    versions: dict[str, str]
    kernels: TunedKernels
    least: dict[str, int]
    made: str
    spread: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "device": self.device,
            "chip": self.chip,
            "versions": self.versions,
            "made": self.made,
            "spread": self.spread,
            "backends": [
                {"head_dim": head_dim, "partial": partial, "order": list(order)}
                for (head_dim, partial), order in self.kernels.backends.items()
            ],
            "tiles": [
                {"kernel": kernel, "width": width, "partial": partial, "tile": list(tile)}
                for (kernel, width, partial), tile in self.kernels.tiles.items()
            ],
            "min_tokens": self.least,
            "measured": self.rows,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Tuned:
        """Raises UnusableError for anything that ``to_dict`` does not make."""
        try:
            if data["format"] != FORMAT:
                raise UnusableError(f"it has format {data['format']!r}, this version reads {FORMAT}")
            backends = {
                (_is(row["head_dim"], int), _is(row["partial"], bool)): tuple(_is(name, str) for name in row["order"])
                for row in data["backends"]
            }
            tiles = {
                (_is(row["kernel"], str), _is(row["width"], int), _is(row["partial"], bool)): _tile(row["tile"])
                for row in data["tiles"]
            }
            least = {_is(name, str): _is(tokens, int) for name, tokens in data["min_tokens"].items()}
            versions = {_is(name, str): _is(version, str) for name, version in data["versions"].items()}
            if min(least.values(), default=0) < 0:
                raise ValueError("min_tokens")
            return cls(
                _is(data["device"], str), _is(data["chip"], str), versions, TunedKernels(tiles, backends), least,
                _is(data["made"], str), float(data["spread"]), list(data["measured"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnusableError(f"it is not what tilewise tune writes ({type(error).__name__}: {error})") from error


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _tile(value: Any) -> tuple[int, int, int, int]:
    rows, keys, stages, warps = (_is(number, int) for number in value)
    return rows, keys, stages, warps


def folder() -> Path:
    """Where files of what was tuned are: the XDG base directory for configuration, which must be absolute to count."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "tilewise"
    try:
        return Path.home() / ".config" / "tilewise"
    except RuntimeError:  # a user without a home, as in some containers: where nothing is, and nothing can be written
        return Path(os.devnull) / "tilewise"


def device_title(device: torch.device) -> str:
    """What a device is called in a file: the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def chip_title(device: torch.device) -> str:
    """Its chip, as the tables of tiles call it."""
    return chip_of(device).name if device.type == "cuda" else device.type


def file_of(device: torch.device) -> Path:
    """The file of a device, there or not."""
    words = re.sub(r"[^a-z0-9]+", "-", device_title(device).lower()).strip("-")
    return folder() / f"tuned-{words}.json"


def versions_here() -> dict[str, str]:
    """The versions of what is timed; "none" for what is not installed."""
    found = {}
    for name in TIMED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def read(device: torch.device) -> Tuned | None:
    """What was tuned on a device; None if nothing was.

    Raises:
        UnusableError: there is a file, and why it is not used: of another chip or version, not JSON, not ours, unreadable.
    """
    file = file_of(device)
    try:
        if file.stat().st_size > BYTES:
            raise UnusableError(f"it has {file.stat().st_size:,} bytes")
        data = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnusableError(f"it cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusableError(f"it is not JSON ({error})") from error
    found = Tuned.from_dict(data)
    if (found.device, found.chip) != (device_title(device), chip_title(device)):
        raise UnusableError(f"it is of {found.device} ({found.chip}), this is {device_title(device)}")
    if found.versions != (here := versions_here()):
        others = [f"{name} {found.versions.get(name, 'none')}, here {here[name]}" for name in here]
        raise UnusableError(f"it is of other versions ({'; '.join(others)})")
    return found


def write(found: Tuned, device: torch.device) -> Path:
    """Write a device's file, atomically: it is complete or as it was.

    Raises:
        OSError: it cannot be written.
    """
    file = file_of(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)  # after the rename there is none left
    return file


def remove(device: torch.device) -> Path | None:
    """Remove a device's file, whatever is in it; which it was, or None if there was none."""
    file = file_of(device)
    if not file.is_file():
        return None
    file.unlink()
    return file
