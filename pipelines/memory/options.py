"""What a request may say about memory, beside what it makes. Nothing here imports PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tilewise.pipelines.loading.offload import OFFLOADS, check_offload
from tilewise.pipelines.options import Option, check_choices, option, options_of
from tilewise.plugins.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """How a pipeline is kept within memory.

    Args:
        offload: see `tilewise.pipelines.loading.offload`.
        vae_tiling: decode in overlapping tiles: less memory, and slightly other pixels where they meet.
        retry_oom: where memory does not suffice, try again with a measure more (`limits.MEASURES`).
    """

    offload: str = option("none", help="Keep weights off the GPU until they are at work.", choices=OFFLOADS)
    vae_tiling: bool = option(False, help="Decode in overlapping tiles: less memory, slightly other pixels.")
    retry_oom: bool = option(False, help="When out of GPU memory, retry with VAE tiling, then with offloading as well.")

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def measures(self) -> list[str]:
        """What is in force from the beginning, in the words of `limits.MEASURES`."""
        return ["vae-tiling"] if self.vae_tiling else []


def check_memory(skeleton: Any, options: MemoryOptions, device: Any) -> None:
    """Raises ConfigError for what a pipeline, which may be without weights, or its torch device cannot do."""
    check_offload(options.offload, device)
    if options.vae_tiling and not callable(getattr(getattr(skeleton, "vae", None), "enable_tiling", None)):
        raise ConfigError(f"--vae-tiling cannot be used with {type(skeleton).__name__}, whose VAE has no tiles")


NOTHING_SAVED = MemoryOptions()
MEMORY_OPTIONS: dict[str, Option] = options_of(MemoryOptions)


def memory_options(fields: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> MemoryOptions:
    """From the fields of a request; run: of the clip of --from, whose tiles are used again as they show in the pixels."""
    given = {name: fields[name] for name in MEMORY_OPTIONS if name in fields}
    if run is not None and "vae-tiling" in run.get("memory_saving", []):
        given.setdefault("vae_tiling", True)
    return MemoryOptions(**given)
