"""How large the blocks of a dynamic method are, how many there may be, and from how many tokens on it pays."""

from __future__ import annotations

import math

from tilewise.kernels.plans.layout import tile_counts

Triple = tuple[int, int, int]
DEFAULT_TILE: Triple = (1, 8, 16)  # 128 tokens, a kernel's whole block; DraftAttention's patch
MAX_BLOCKS = 8192  # 1,048,576 tokens in whole blocks. Maps are heads × N × N: at 12 heads and as many, 3.2 GB each
FEWEST_BLOCKS = 64  # a smaller map leaves little to choose from: the tile is halved until there are so many
SMALLEST_TILE = 16  # tokens: the least that a kernel's block is used for
# Tokens below which a call stays dense, as planning and its launches would cost more than sparse attention saves: on a CPU as
# tried on the demo model; on a GPU where a quarter density breaks even with cuDNN at 24 heads × 128, an H100 (0.76 × at 10,800
# tokens, 1.75 × at 18,000: benchmarks/dynamic.py). What it costs there is the host's time for the launches, about 2 ms a call.
MIN_TOKENS = {"cuda": 12_800, "cpu": 1024}


def default_tile(shape: Triple) -> Triple:
    """(1, 8, 16), halved on its longer side until the grid has 64 tiles or a tile 16 tokens."""
    t, h, w = DEFAULT_TILE
    while math.prod(tile_counts(shape, (t, h, w))) < FEWEST_BLOCKS and h * w > SMALLEST_TILE:
        h, w = (h, w // 2) if w > h else (h // 2, w)
    return (t, h, w)
