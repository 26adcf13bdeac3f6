"""Measure peak memory, and reduce it when a clip does not fit (VAE tiling, offload)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewise.plugins.errors import ConfigError

TILING, OFFLOAD = "vae-tiling", "offload"
MEASURES = (TILING, OFFLOAD)
"""What --retry-oom tries, in this order and each on top of the last. vae-tiling decodes in overlapping tiles, which changes
pixels slightly where they are blended; offload keeps on the GPU only the part of the pipeline that is at work: slower, same
pixels."""


@contextlib.contextmanager
def saving(pipe: Any, measures: Sequence[str]) -> Iterator[None]:
    """Runs a block with measures in force, and undoes them. One that the pipeline cannot take (`possible`) is an error."""
    with contextlib.ExitStack() as undo:
        for measure in measures:
            if measure not in possible(pipe):
                raise ConfigError(f"the memory measure {measure!r} cannot be used with {type(pipe).__name__} here")
            undo.callback(_SWITCHES[measure](pipe))
        yield


def possible(pipe: Any) -> list[str]:
    """The measures that would change anything for a pipeline, in the order of MEASURES."""
    vae = getattr(pipe, "vae", None)
    tiling = callable(getattr(vae, "enable_tiling", None)) and not getattr(vae, "use_tiling", False)
    offload = getattr(pipe, "model_cpu_offload_seq", None) is not None and pipe.device.type == "cuda"
    return [name for name, works in zip(MEASURES, (tiling, offload), strict=True) if works]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or the machine, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # PyTorch has no class for it


def free_memory() -> None:
    """Gives back what a failed or finished run left in the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PeakMemory:
    """The peak memory of what runs between `start` and `read`, in bytes.

    On a GPU, of PyTorch's allocator; otherwise the process's resident set, where the system lets it be counted anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_allocated(self.device), "of": "GPU, allocated by PyTorch"}
        try:
            status = Path("/proc/self/status").read_text()
            kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return {"bytes": None, "of": "unknown: the system does not tell"}
        return {"bytes": 1024 * int(kilobytes), "of": "process, resident"}


def _tiling(pipe: Any) -> Any:
    pipe.vae.enable_tiling()
    return pipe.vae.disable_tiling


def _offload(pipe: Any) -> Any:
    device = pipe.device
    pipe.enable_model_cpu_offload(device=device)

    def undo() -> None:
        pipe.remove_all_hooks()
        pipe.to(device)

    return undo


_SWITCHES = {TILING: _tiling, OFFLOAD: _offload}
