"""Compiles the portable kernels for chips that are not here, and tells what they take: registers, shared memory, what spills.

Triton needs no GPU to compile. ``python -m examples.list_tiles`` writes docs/tiles.md from this and fails where an instance is
missing, spills or does not fit; the tests do the same for some of them at each run.

How many blocks of a kernel a multiprocessor holds at once is arithmetic:

    blocks = ⌊min( threads of it / threads of a block,  its registers / those of a block,  its shared memory / a block's )⌋
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewise.kernels.attention.backends import triton as portable
from tilewise.kernels.attention.backends import triton_8bit as portable_8bit
from tilewise.kernels.attention.backends.tiles import SINGLE, TILES, Tile, tiles_of, width_of
from tilewise.kernels.chips import CHIPS, Chip

REGISTERS = 65_536  # of a multiprocessor, and 255 of a thread, on every NVIDIA chip from 8.0 on
GRANULE = 8  # registers of a thread are given in eights

# What a launch would ask Triton for: (jit function, constants, types of parameters), from head dimension, intervals, tile, dtype.
Specialisation = Callable[[int, bool, Tile, str], tuple[Any, dict[str, Any], dict[str, str]]]
KERNELS: Mapping[str, Specialisation] = {
    "triton": portable.specialisation,
    "triton-8bit": portable_8bit.specialisation,
}
FIRST_FP8 = 89  # compute capability of the first chip with products in e4m3


@dataclass(frozen=True)
class Instance:
    """One kernel as it is compiled for a chip. dtype: of queries, keys and values; in 8 bits, of the values."""

    kernel: str
    chip: Chip
    head_dim: int
    intervals: bool
    tile: Tile
    dtype: str = "bf16"

    def __str__(self) -> str:
        partial = ", partial blocks" if self.intervals else ""
        return f"{self.kernel} on {self.chip.name}, {self.dtype}, head {self.head_dim}{partial}, {self.tile}"


@dataclass(frozen=True)
class Compiled:
    """What an instance takes.

    Attributes:
        registers: of a thread. shared: bytes of a block. spilled: bytes of a thread that went to memory for want of registers.
        product: the matrix instruction that it uses: "mma", "wgmma", "tcgen05", "mfma" or "wmma"; "": none.
    """

    registers: int
    shared: int
    spilled: int
    product: str

    def blocks(self, instance: Instance) -> int | None:
        """How many of its blocks a multiprocessor holds at once; None where that is not told (AMD)."""
        chip, threads = instance.chip, instance.tile.warps * instance.chip.warp
        if chip.threads is None or chip.kib is None:
            return None
        registers = -(-self.registers // GRANULE) * GRANULE
        return min(chip.threads // threads, REGISTERS // (registers * threads), chip.kib * 1024 // (self.shared + 1024))

    def wrong(self, instance: Instance) -> str | None:
        """Why the instance must not be shipped, or None."""
        room = instance.chip.block_kib * 1024
        if self.shared > room:
            return (
                f"{instance} takes {self.shared / 1024:.1f} KiB of shared memory, a block has {instance.chip.block_kib}"
            )
        if self.spilled and instance.dtype != "fp32":
            return f"{instance} spills {self.spilled} bytes of a thread"
        if not self.product and instance.dtype != "fp32":
            return f"{instance} uses no matrix instruction"
        return None


def instances(chips: tuple[str, ...] = tuple(CHIPS)) -> Iterator[Instance]:
    """Every instance of every kernel that is shipped for these chips."""
    for kernel, name in itertools.product(TILES, chips):
        chip = CHIPS[name]
        for head_dim, intervals in itertools.product(TILES[kernel].get(name, {}), (False, True)):
            for tile in tiles_of(kernel, chip, head_dim, intervals):
                yield from (
                    Instance(kernel, chip, head_dim, intervals, tile, dtype) for dtype in dtypes_of(kernel, chip)
                )


def dtypes_of(kernel: str, chip: Chip) -> tuple[str, ...]:
    """What a kernel is compiled for on a chip: 16-bit types compile alike, 8-bit ones do not."""
    if kernel != "triton-8bit":
        return ("bf16",)
    return ("int8", "fp8") if (chip.capability or 0) >= FIRST_FP8 else ("int8",)


def single(chip: str, head_dim: int) -> Instance:
    """The float32 instance of the 16-bit kernel."""
    return Instance("triton", CHIPS[chip], head_dim, True, SINGLE[width_of(head_dim)], "fp32")


def compiled(instance: Instance) -> Any:
    """An instance as Triton compiles it, with its assembly in ``asm``. Triton keeps what it compiled in its cache.

    Raises:
        Exception: whatever Triton raises for what it cannot compile.
    """
    function, constants, types = KERNELS[instance.kernel](
        instance.head_dim, instance.intervals, instance.tile, instance.dtype
    )
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        # As at run time: tensors are 16-byte aligned and strides are multiples of 16 elements.
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    chip, tile = instance.chip, instance.tile
    nvidia = chip.capability is not None
    target = GPUTarget("cuda" if nvidia else "hip", chip.capability or chip.name, chip.warp)
    return triton.compile(source, target=target, options={"num_stages": tile.stages, **tile.options(instance.dtype)})


def compile_instance(instance: Instance) -> Compiled:
    """What an instance takes. Raises as ``compiled``."""
    done = compiled(instance)
    return _amd(done) if instance.chip.capability is None else _nvidia(done)


def _nvidia(done: Any) -> Compiled:
    registers, stack = cubin_usage(done.asm["cubin"])
    ptx = done.asm["ptx"]
    product = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "")
    return Compiled(registers, done.metadata.shared, stack, product.split(".")[0])


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread of an assembled kernel. Ours have no arrays: what is on the stack is spilled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run(
            [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump told no registers: {report!r}")
    return int(found[1]), int(found[2])


def _amd(done: Any) -> Compiled:
    text = done.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly does not tell {name}")
        return int(found[1])

    product = next((name for name in ("mfma", "wmma") if f"v_{name}" in text), "")
    return Compiled(number("vgpr_count"), done.metadata.shared, number("private_segment_fixed_size"), product)
