"""Draw what one query sees under each method whose window is fixed: the pictures of docs/methods.md.

    python -m examples.draw_methods docs/images

A row is a query; the columns are the latent frames of a small clip. The query is red, the tokens that it sees are blue, the
others grey; dark lines are the borders of tiles where the window counts in tiles.
"""

import argparse
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
    """Filmstrips of the query's region, one below the other."""
    columns = shifts_of(method) if isinstance(method, ShiftedWindows) else frames_of(method)
    width, height = GRID.w * CELL, GRID.h * CELL
    size = (len(columns) * (width + GAP) + GAP, len(QUERIES) * (height + GAP) + LABEL)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for place, column in enumerate(columns):
        layout, t = column.layout, column.frame
        plan = method.plan(layout, 1, torch.device("cpu"))
        pen.text((GAP + place * (width + GAP), 3), column.label, fill=TILE)
        for row, query in enumerate(column.queries):
            region = region_of_query(plan, layout, query, 0)
            left, top = GAP + place * (width + GAP), LABEL + row * (height + GAP)
            draw_frame(pen, (left, top), region[t], query[1:] if t == query[0] else None)
            if not isinstance(method, tilewise.STA):
                continue
            for h in range(0, GRID.h, layout.tile[1]):
                pen.line((left, top + h * CELL - 1, left + width - 2, top + h * CELL - 1), fill=TILE)
            for w in range(0, GRID.w, layout.tile[2]):
                pen.line((left + w * CELL - 1, top, left + w * CELL - 1, top + height - 2), fill=TILE)
    return picture.quantize(16)


def draw_frame(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    region: torch.Tensor,
    query: tuple[int, int] | None,
    cell: int = CELL,
) -> None:
    """One latent frame. region: (H, W) bool, tokens that the query sees; query: its row and column, if it is in this frame."""
    for h in range(region.shape[0]):
        for w in range(region.shape[1]):
            colour = QUERY if (h, w) == query else SEEN if region[h, w] else UNSEEN
            x, y = corner[0] + w * cell, corner[1] + h * cell
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where NAME.png are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in METHODS.items():
        draw(method).save(folder / f"method-{name}.png", optimize=True)
        print(folder / f"method-{name}.png")
