"""What was tuned on this machine, put to use: ``patch`` reads the files of its devices, and kernels and methods ask here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from tilewise.kernels.attention import tuned
from tilewise.kernels.attention.tuned import TunedKernels
from tilewise.plugins.tuning.record import Tuned, UnusableError, file_of, folder, read

_in_use: Mapping[str, Tuned] = {}  # by device; replaced and never changed: other threads may be looking things up
_WARNED: set[str] = set()


def devices_here() -> list[torch.device]:
    """The CPU and each GPU that PyTorch sees."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def load() -> None:
    """Read what was tuned on the devices of this machine, and run by it from here on. A file that says nothing here is left out,
    with one warning a process."""
    global _in_use
    records: dict[str, Tuned] = {}
    kernels: dict[str, tuple[str, TunedKernels]] = {}
    for device in devices_here() if folder().is_dir() else ():
        try:
            found = read(device)
        except UnusableError as error:
            told = f"{file_of(device)} is not used: {error}. `tilewise tune` writes it anew, `tilewise tune --reset` removes it"
            if told not in _WARNED:
                _WARNED.add(told)
                warnings.warn(told, stacklevel=3)
            continue
        if found is not None:
            name = tuned.device_key(device)
            kernels[name] = found.chip, found.kernels
            records[name] = found
    _in_use = records
    tuned.use(kernels)


def least_tokens(method: str, device: torch.device) -> int | None:
    """From how many tokens on a method's attention was faster than stock on a device; None if that was not measured."""
    found = in_use(device)
    return None if found is None else found.least.get(method)


def in_use(device: torch.device) -> Tuned | None:
    """What a device runs by; None: the usual rules."""
    return _in_use.get(tuned.device_key(device)) if _in_use else None


def words(device: torch.device) -> str | None:
    """The same in a line, or None."""
    found = in_use(device)
    return None if found is None else words_of(found)


def words_of(found: Tuned) -> str:
    """What was tuned, in a line."""
    least = ", ".join(f"{method} from {tokens:,} tokens" for method, tokens in found.least.items())
    return f"as tuned on this {found.device} on {found.made[:10]}" + (f": {least}" if least else "")
