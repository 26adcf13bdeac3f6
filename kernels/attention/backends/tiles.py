"""Which tiles a portable kernel computes in on which chip: one table, by kernel, chip, width of the head and kind of plan.

Chosen by rule and not by ``triton.autotune``: the first call of a shape costs one compilation, and the CPU interpreter runs the
same code. The first tile of an entry is what runs unless ``tilewise tune`` found another of them faster on the user's own card.
Every tile compiles without register spills and within its chip's shared memory (``ahead_of_time.py``, docs/tiles.md); those of
sm_90 are also the fastest that were measured (benchmarks/launch.py).

A kernel gives its instances here, and in ``ahead_of_time.py`` how they are compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from tilewise.kernels.attention import tuned
from tilewise.kernels.chips import Chip


class Tile(NamedTuple):
    """What one program computes at a time: rows of queries × keys, with buffers for so many stages, by so many warps.

    registers: the most that a thread may take in int8, so that more programs fit (e4m3 would spill); 0: the compiler decides."""

    rows: int
    keys: int
    stages: int
    warps: int
    registers: int = 0

    def __str__(self) -> str:
        few = f", {self.registers} registers" if self.registers else ""
        return f"{self.rows}×{self.keys}, {self.stages} stages, {self.warps} warps{few}"

    def options(self, dtype: str) -> dict[str, int]:
        """What Triton is told at a launch, beside the kernel's constants. dtype: of values."""
        limit = {"maxnreg": self.registers} if self.registers and dtype == "int8" else {}
        return {"num_warps": self.warps, **limit}


# Width of the head → tiles of plans without partial blocks, and with them: their test needs registers too.
Rules: TypeAlias = Mapping[int, tuple[tuple[Tile, ...], tuple[Tile, ...]]]
HEAD_DIMS = (64, 96, 128, 256)  # widths that there are rules for

# Products from registers (mma.sync): 128 rows for 8 warps are 16 each, the instruction's own. FlashAttention-2 takes the same
# sizes for a head of 128: 64 keys on an A100, 32 with 99 KiB.
_AMPERE: Rules = {
    64: ((Tile(128, 64, 3, 8), Tile(128, 128, 2, 8)), (Tile(128, 64, 3, 8), Tile(128, 64, 2, 8))),
    96: ((Tile(128, 32, 2, 8), Tile(128, 32, 3, 8)), (Tile(64, 64, 2, 8),)),
    128: ((Tile(128, 64, 2, 8), Tile(128, 32, 2, 8)), (Tile(128, 64, 2, 8), Tile(64, 64, 2, 8))),
    256: ((Tile(64, 32, 2, 8), Tile(64, 32, 3, 8)), (Tile(64, 32, 2, 8), Tile(64, 32, 3, 8))),
}
_ADA: Rules = {
    64: ((Tile(128, 64, 3, 8), Tile(64, 32, 3, 4)), (Tile(128, 64, 3, 8), Tile(64, 32, 2, 4))),
    96: ((Tile(128, 32, 2, 8), Tile(128, 64, 2, 8)), (Tile(128, 32, 2, 8), Tile(128, 64, 2, 8))),
    128: ((Tile(128, 32, 2, 8), Tile(128, 64, 2, 8)), (Tile(128, 32, 2, 8), Tile(128, 64, 2, 8))),
    256: ((Tile(64, 32, 2, 8), Tile(64, 32, 3, 8)), (Tile(64, 32, 2, 8), Tile(64, 32, 3, 8))),
}
_BLACKWELL_CONSUMER: Rules = {  # 64 keys spill there
    **_ADA,
    96: ((Tile(128, 32, 2, 8), Tile(64, 32, 3, 4)), (Tile(128, 32, 2, 8), Tile(64, 64, 2, 8))),
    128: ((Tile(128, 32, 2, 8), Tile(64, 32, 3, 4)), (Tile(128, 32, 2, 8), Tile(64, 64, 2, 8))),
}
# Products from shared memory (wgmma, tcgen05), 227 KiB.
_HOPPER: Rules = {
    64: ((Tile(128, 64, 5, 8), Tile(128, 64, 3, 8)), (Tile(128, 64, 5, 8), Tile(128, 64, 3, 8))),
    96: ((Tile(128, 64, 5, 8), Tile(128, 64, 3, 8)), (Tile(128, 64, 5, 8), Tile(128, 64, 3, 8))),
    128: ((Tile(128, 64, 5, 8), Tile(128, 64, 3, 8)), (Tile(128, 64, 5, 8), Tile(128, 64, 3, 8))),
    256: ((Tile(64, 64, 3, 8),), (Tile(64, 64, 3, 8),)),
}
_BLACKWELL: Rules = {
    64: ((Tile(128, 64, 5, 8), Tile(128, 128, 3, 8)), (Tile(128, 64, 5, 8), Tile(128, 128, 3, 8))),
    96: ((Tile(128, 64, 5, 8),), (Tile(128, 64, 5, 8), Tile(128, 64, 3, 8))),
    128: ((Tile(128, 64, 5, 8),), (Tile(128, 64, 5, 8), Tile(128, 64, 3, 8))),
    256: ((Tile(64, 64, 3, 8),), (Tile(64, 64, 3, 8),)),
}
# AMD: nothing is known but that they compile.
_CDNA: Rules = {
    64: ((Tile(128, 64, 1, 4),), (Tile(128, 64, 1, 4),)),
    96: ((Tile(128, 32, 1, 4),), (Tile(128, 32, 1, 4),)),
    128: ((Tile(128, 32, 1, 4),), (Tile(128, 32, 1, 4),)),
    256: ((Tile(64, 32, 1, 4),), (Tile(64, 32, 1, 4),)),
}
_RDNA: Rules = {  # none for 256: every tile spills
    64: ((Tile(64, 32, 1, 4),), (Tile(64, 32, 1, 4),)),
    96: ((Tile(64, 16, 1, 8),), (Tile(64, 16, 1, 8),)),
    128: ((Tile(64, 32, 1, 8),), (Tile(64, 16, 1, 8),)),
}
# In 8 bits, heads of 64 and 128. On an H200 at 115,200 tokens and 24 heads × 128, dense: (64, 128) 219 ms with three programs
# on a multiprocessor, 282 with two, (128, 128) 362. Blackwell has no integer products of its own (tcgen05 has none for int8): it
# works as Ampere does.
_AMPERE_8BIT: Rules = {
    64: ((Tile(128, 64, 2, 8),), (Tile(128, 64, 2, 8),)),
    128: ((Tile(128, 64, 2, 8),), (Tile(128, 64, 2, 8),)),
}
_HOPPER_8BIT: Rules = {
    64: ((Tile(64, 128, 2, 4),), (Tile(64, 128, 2, 4),)),
    128: ((Tile(64, 128, 2, 4, 168),), (Tile(64, 64, 2, 4), Tile(128, 64, 2, 8))),
}
_BLACKWELL_8BIT: Rules = {  # with partial blocks, 128 × 64 spills
    64: ((Tile(128, 64, 2, 8),), (Tile(128, 64, 2, 8),)),
    128: ((Tile(128, 64, 2, 8),), (Tile(128, 32, 2, 8),)),
}
TILES: Mapping[str, Mapping[str, Rules]] = {
    "triton": {
        "sm_80": _AMPERE,
        "sm_86": _ADA,
        "sm_89": _ADA,
        "sm_90": _HOPPER,
        "sm_100": _BLACKWELL,
        "sm_120": _BLACKWELL_CONSUMER,
        "gfx942": _CDNA,
        "gfx1100": _RDNA,
    },
    "triton-8bit": {  # none for AMD: the kernel has instructions of NVIDIA's
        "sm_80": _AMPERE_8BIT,
        "sm_86": _AMPERE_8BIT,
        "sm_89": _AMPERE_8BIT,
        "sm_90": _HOPPER_8BIT,
        "sm_100": _BLACKWELL_8BIT,
        "sm_120": _BLACKWELL_8BIT,
    },
}
# float32 runs without matrix units: one rule for all chips, by width.
SINGLE = {64: Tile(128, 64, 3, 8), 96: Tile(64, 32, 2, 8), 128: Tile(64, 32, 2, 8), 256: Tile(32, 32, 1, 4)}


def width_of(head_dim: int) -> int:
    """The width of rules that a head dimension goes by: one that is no power of two needs registers for its masks."""
    return next(width for width in HEAD_DIMS if head_dim <= width)


def no_tile(kernel: str, chip: Chip, head_dim: int) -> str | None:
    """Why a kernel has no tile for a head dimension on a chip, or None if it has."""
    if width_of(head_dim) in TILES[kernel].get(chip.name, {}):
        return None
    return f"there is no tile of the kernel {kernel} for head dimension {head_dim} on {chip.name}"


def tiles_of(kernel: str, chip: Chip, head_dim: int, intervals: bool) -> tuple[Tile, ...]:
    """The tiles in 16 or 8 bits, the usual one first. intervals: whether the plan has partial blocks."""
    return TILES[kernel][chip.name][width_of(head_dim)][intervals]


def tile_of(kernel: str, chip: Chip, head_dim: int, intervals: bool) -> Tile:
    """The tile that runs in 16 or 8 bits: the one that ``tilewise tune`` chose on this machine, or the usual one."""
    usual = tiles_of(kernel, chip, head_dim, intervals)
    chosen = tuned.tile(kernel, chip.name, width_of(head_dim), intervals)
    return next((tile for tile in usual if tile[:4] == chosen), usual[0])
