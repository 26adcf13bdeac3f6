"""The page of tiles by chip, from what Triton compiles for each: python -m examples.list_tiles > docs/tiles.md

Needs no GPU. Some minutes: all instances of the portable kernels are compiled, in as many processes as there are cores; Triton's
cache keeps them. Fails where one spills registers, does not fit its chip or is missing.
"""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

from examples import units
from tilewise.kernels.attention.ahead_of_time import Compiled, Instance, compile_instance, instances
from tilewise.kernels.attention.backends.tiles import TILES
from tilewise.kernels.chips import CHIPS

HEAD = """# Tiles by chip

Which tiles the portable Triton kernels compute in on which chip: `kernels/attention/backends/tiles.py` has the rules. The first
line of a chip, head dimension and kind of plan is what runs; `tilewise tune` tries the others on your own card
([tune](tune.md)). **Everything on this page is computed, not measured**: Triton compiles for a chip that is not there, and its
assembler says what a kernel takes. Only the chips with a card under "run on" have run these kernels.

- *type*: of the values; in 8 bits, scores are int8 in both. *whole blocks*: plans without partial blocks.
- *registers* and *spilled*: of a thread, in registers and bytes. An instance that spills is not shipped.
- *shared*: of a block, in KiB.
- *blocks*: how many of them a multiprocessor holds at once, by its threads, registers and shared memory; *warps* in them.

`python -m examples.list_tiles > docs/tiles.md` compiles all of it again, and fails where an instance spills, does not fit, or is
missing. The tests compile some instances of every chip at each run.

"""
CARDS = "| chip | cards | shared memory of a block | run on |\n| --- | --- | --- | --- |\n"
COLUMNS = (
    "| type | head | plan | tile | registers | spilled | shared | blocks | warps | product |\n" + "| --- " * 10 + "|\n"
)
PLANS = ("whole blocks", "with partial blocks")
ROW = re.compile(
    r"\| (\w+) \| (\d+) \| ([^|]+) \| (\d+×\d+, \d+ stages, \d+ warps(?:, \d+ registers)?) \| (\d+) \| (\d+) \| (\d+\.\d+) "
    r"\|.*\| (\w*) \|"
)


def page(found: dict[Instance, Compiled]) -> str:
    """docs/tiles.md."""
    cards = "".join(
        f"| {chip.name} | {chip.cards} | {chip.block_kib} KiB | {chip.run or 'none: compiled only'} |\n"
        for chip in CHIPS.values()
    )
    text = HEAD + CARDS + cards
    for kernel in TILES:
        for chip in (CHIPS[name] for name in TILES[kernel]):
            text += f"\n## {kernel} on {chip.name}\n\n" + COLUMNS
            text += "".join(
                _row(instance, taken)
                for instance, taken in found.items()
                if (instance.kernel, instance.chip.name) == (kernel, chip.name)
            )
    return text + units.table()


def _row(instance: Instance, taken: Compiled) -> str:
    blocks = taken.blocks(instance)
    held = ("–", "–") if blocks is None else (blocks, blocks * instance.tile.warps)
    cells = (
        instance.dtype, instance.head_dim, PLANS[instance.intervals], instance.tile, taken.registers, taken.spilled,
        f"{taken.shared / 1024:.2f}", *held, taken.product,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def rows_of_page(text: str) -> dict[str, Compiled]:
    """What the page says of each instance, by its name."""
    found: dict[str, Compiled] = {}
    kernel = chip = ""
    for line in text.splitlines():
        if title := re.match(r"## (\S+) on (\S+)$", line):
            kernel, chip = title[1], title[2]
        elif row := ROW.match(line):
            dtype, head, plan, tile, registers, spilled, shared, product = row.groups()
            partial = ", partial blocks" if plan == PLANS[1] else ""
            name = f"{kernel} on {chip}, {dtype}, head {head}{partial}, {tile}"
            found[name] = Compiled(int(registers), round(float(shared) * 1024), int(spilled), product)
    return found


def main() -> None:
    """Prints the page; with ``--check``, only says what is wrong."""
    every = list(instances())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(every, pool.map(compile_instance, every, chunksize=4), strict=True))
    wrong = [why for instance, taken in found.items() if (why := taken.wrong(instance))]
    if "--check" not in sys.argv:
        print(page(found), end="")
    print("\n".join(wrong) or f"{len(every)} instances, all good", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
