"""The chips that attention kernels are compiled for: what a block may take of one, and whether ours have run on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Chip:
    """A GPU architecture.

    Attributes:
        name: as its compiler calls it: "sm_89", "gfx942".
        cards: some of those that have it.
        block_kib: shared memory that one block may take, in KiB.
        kib: that a multiprocessor has, of which a block takes 1 KiB more than it asks for; None: not told here (AMD).
        threads: that a multiprocessor holds at once; None likewise.
        warp: threads of a warp.
        run: the cards on which these kernels were run and checked; "": none.
    """

    name: str
    cards: str
    block_kib: int
    kib: int | None = None
    threads: int | None = None
    warp: int = 32
    run: str = ""

    @property
    def capability(self) -> int | None:
        """Of an NVIDIA chip: 89 for 8.9."""
        return int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else None


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". AMD: CDNA 3 and RDNA 3 ISA guides.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "A100, A30", 163, 164, 2048),
        Chip("sm_86", "RTX 3090, RTX A6000, A10", 99, 100, 1536),
        Chip("sm_89", "RTX 4090, L40S, L4", 99, 100, 1536),
        Chip("sm_90", "H100, H200", 227, 228, 2048, run="H100, H200"),
        Chip("sm_100", "B200, GB200", 227, 228, 2048),
        Chip("sm_120", "RTX 5090, RTX PRO 6000", 99, 100, 1536),
        Chip("gfx942", "MI300X", 64, warp=64),
        Chip("gfx1100", "RX 7900 XTX", 64),
    )
}
# Chips that have no rules of their own, and those of another with no more shared memory and the same matrix instructions.
LIKE = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}
CAREFUL = "sm_86"  # what every NVIDIA GPU from 8.0 on has room for


def chip_name(device: torch.device) -> str:
    """What a GPU is called by its compiler."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip whose rules a device goes by: its own, or one that asks for no more than it has. A CPU, where kernels run in
    Triton's interpreter, goes by the most careful ones."""
    if device.type != "cuda":
        return CHIPS[CAREFUL]
    name = chip_name(device)
    like = LIKE.get(name, CAREFUL)
    if torch.version.hip is not None:
        like = "gfx942" if name.startswith("gfx9") else "gfx1100"
    return CHIPS.get(name) or CHIPS[like]


def has_large_memory(device: torch.device) -> bool:
    """Whether a device is a data centre's Hopper or Blackwell: products read their operands from shared memory, of which a block
    has 227 KiB. Blackwell for consumers (12.0) works as Ampere does, with 99 KiB."""
    return device.type == "cuda" and chip_of(device).block_kib >= 227
