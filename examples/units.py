"""The portable kernel against FlashAttention-2 by the arithmetic of a chip's units: part of the page that list_tiles writes.

Clocks that a multiprocessor's units need for one tile of scores, rows × keys of a head of 128, in 16 bits:

    matrix units    4 · rows · keys · head / their operations a clock, with sums in float32
    exponentials    rows · keys / 16 a clock
    float32         rows · keys · (3.5 + head / keys) / lanes: scale and subtract, maximum, sum, half a conversion; rescaling
    shared memory   each warp reads all keys and values of the tile: warps · 2 · keys · head · 2 bytes / 128 bytes a clock

If the units work at the same time, the slowest decides; if they wait for each other, their sum. What really happens is between.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.kernels.attention.backends.tiles import tile_of
from tilewise.kernels.chips import CHIPS

HEAD = 128
EXPONENTIALS, SHARED_BYTES = 16, 128  # a clock and multiprocessor, on all of these chips
OTHERS = 3.5  # float32 operations a score beside rescaling


@dataclass(frozen=True)
class Card:
    """What a multiprocessor does a clock. products: operations of the matrix units in 16 bits with float32 sums, of which GeForce
    cards have half of what the chip does in workstations. lanes: float32 operations."""

    name: str
    chip: str
    products: int
    lanes: int


CARDS = (
    Card("A100", "sm_80", 2048, 64),
    Card("RTX A6000", "sm_86", 1024, 128),
    Card("RTX 3090", "sm_86", 512, 128),
    Card("L40S", "sm_89", 1024, 128),
    Card("RTX 4090", "sm_89", 512, 128),
    Card("RTX 5090", "sm_120", 512, 128),
)
# FlashAttention-2's tiles for a head of 128 without a causal mask, (keys, warps), 128 rows: its own source, as PyTorch ships it.
FLASH2 = {"sm_80": (64, 4), "sm_86": (32, 4), "sm_89": (32, 4), "sm_120": (64, 4)}

TEXT = """
## Against FlashAttention-2, by arithmetic

Dense attention of a head of 128 in 16 bits: the portable kernel against FlashAttention-2 (what PyTorch runs on these cards), by
what a multiprocessor's units need for 128 × 64 scores, in its clocks. **Computed, not measured**: both are assumed to be without
other losses.

Both use the same matrix instruction there, so the portable kernel can at best be as fast where the matrix units decide; it is not
1.2 times as fast, as on an H100, where it has Hopper's instruction and FlashAttention-2 has not. Its warps hold 16 rows each and
FlashAttention-2's 32, so that it reads keys and values from shared memory twice as often. A density below 1 is what makes the
portable kernel faster on these cards; dense calls stay PyTorch's.

| card | matrix units | exponentials | float32, ours / FA2 | shared memory, ours / FA2 | FA2 ÷ ours, units at once | in turn |
| --- | --- | --- | --- | --- | --- | --- |
"""


def clocks(card: Card, keys: int, warps: int) -> tuple[float, float, float, float]:
    """Clocks of (matrix units, exponentials, float32, shared memory) for 128 × 64 scores, computed 128 × ``keys`` at a time."""
    scores, pieces = 128 * 64, 64 // keys
    return (
        4 * scores * HEAD / card.products,
        scores / EXPONENTIALS,
        scores * (OTHERS + HEAD / keys) / card.lanes,
        pieces * warps * 2 * keys * HEAD * 2 / SHARED_BYTES,
    )


def table() -> str:
    """The section of the page."""
    text = TEXT
    for card in CARDS:
        tile = tile_of("triton", CHIPS[card.chip], HEAD, False)
        assert tile.rows == 128
        ours, flash = clocks(card, tile.keys, tile.warps), clocks(card, *FLASH2[card.chip])
        at_once, in_turn = max(flash) / max(ours), sum(flash) / sum(ours)
        text += (
            f"| {card.name} ({card.chip}) | {ours[0]:.0f} | {ours[1]:.0f} | {ours[2]:.0f} / {flash[2]:.0f} | "
            f"{ours[3]:.0f} / {flash[3]:.0f} | {at_once:.2f} | {in_turn:.2f} |\n"
        )
    return text
