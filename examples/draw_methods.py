"""Draw what one query sees under each method whose window is fixed: the pictures of docs/methods.md.

    python -m examples.draw_methods docs/images

A row is a query; the columns are the latent frames of a small clip. The query is red, the tokens that it sees are blue, the
others grey; dark lines are the borders of tiles where the window counts in tiles.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

import tilewise
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.kernels.plans.query_visibility import region_of_query
from tilewise.plugins.methods.base import Method, make_method
from tilewise.plugins.methods.shifted_windows import ShiftedWindows, shift_of
from tilewise.plugins.models.common.family import AttentionLayer

GRID = Grid(7, 15, 22)  # latent frames, rows, columns: no tile divides it
QUERIES = [(3, 7, 10), (0, 1, 20)]  # in the middle, and at a border
CELL, GAP, LABEL = 7, 10, 16
SEEN, UNSEEN, QUERY, TILE, PAPER = (59, 118, 196), (226, 228, 232), (214, 39, 40), (120, 124, 132), (255, 255, 255)


class Column(NamedTuple):
    """One map of a picture: a latent frame of a layout, and the queries whose regions are drawn."""

    label: str
    layout: Layout
    frame: int
    queries: list[tuple[int, int, int]]


METHODS: dict[str, Method] = {
    "sta": tilewise.STA(window=(3, 3, 3), tile=(2, 4, 4)),
    "inward": make_method("inward", {"native": (7, 11)}),
    "neighborhood": make_method("neighborhood", {"window": (3, 7, 9)}),
    "shifted-windows": tilewise.ShiftedWindows(levels=(0,)),
    "neighborhood-dilated": make_method("neighborhood", {"window": (3, 5, 7), "dilation": (1, 2, 2)}),
}


def frames_of(method: Method) -> list[Column]:
    """A clip under a method: a column a latent frame."""
    layout = method.layout(GRID)
    assert layout is not None
    return [Column(f"latent frame {t}", layout, t, QUERIES) for t in range(GRID.t)]


def shifts_of(method: ShiftedWindows) -> list[Column]:
    """A UNet's map under each shift that a layer may draw: a column a shift."""
    grid = Grid(1, GRID.h, GRID.w)
    steps = [next(step for step in range(99) if shift_of(method.seed, step, 0) == shift) for shift in range(4)]
    layer = AttentionLayer("", torch.nn.Identity(), 0, 1, 1, 0)
    queries = [(0, h, w) for _, h, w in QUERIES]
    found = []
    for shift, step in enumerate(steps):
        layout = method.map_layout(grid, layer, step)
        assert layout is not None
        found.append(Column(f"shift {shift}", layout, 0, queries))
    return found


def draw(method: Method) -> Image.Image:
    """Filmstrips of the queries' regions, one below the other."""
    layout = method.layout(GRID)
    assert layout is not None
    plan = method.plan(layout, 1, torch.device("cpu"))
    regions = [(query, region_of_query(plan, layout, query, 0)) for query in QUERIES]
    return strips(GRID, regions, layout.tile if isinstance(method, tilewise.STA) else None)


def strips(
    grid: Grid,
    regions: Sequence[tuple[tuple[int, int, int], torch.Tensor]],
    tile: tuple[int, int, int] | None,
    cell: int = CELL,
) -> Image.Image:
    """A filmstrip for each query and region (T, H, W) bool, one below the other. tile: whose borders are drawn. cell: pixels."""
    width, height = grid.w * cell, grid.h * cell
    size = (grid.t * (width + GAP) + GAP, len(regions) * (height + GAP) + LABEL)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for t in range(grid.t):
        pen.text((GAP + t * (width + GAP), 3), f"latent frame {t}", fill=TILE)
    for row, (query, region) in enumerate(regions):
        for t in range(grid.t):
            left, top = GAP + t * (width + GAP), LABEL + row * (height + GAP)
            for h in range(grid.h):
                for w in range(grid.w):
                    colour = QUERY if (t, h, w) == query else SEEN if region[t, h, w] else UNSEEN
                    x, y = left + w * cell, top + h * cell
                    pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            if tile is None:
                continue
            for h in range(0, grid.h, tile[1]):
                pen.line((left, top + h * cell - 1, left + width - 2, top + h * cell - 1), fill=TILE)
            for w in range(0, grid.w, tile[2]):
                pen.line((left + w * cell - 1, top, left + w * cell - 1, top + height - 2), fill=TILE)
    return picture.quantize(16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where NAME.png are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in METHODS.items():
        draw(method).save(folder / f"method-{name}.png", optimize=True)
        print(folder / f"method-{name}.png")
