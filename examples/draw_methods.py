"""Draw what one query sees under each method whose window is fixed: the pictures of docs/methods.md.

    python -m examples.draw_methods docs/images

A row is a query; the columns are the latent frames of a small clip. The query is red, the tokens that it sees are blue, the
others grey; dark lines are the borders of tiles where the window counts in tiles.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.kernels.plans.query_visibility import region_of_query
from tilewise.plugins.methods.base import Method, make_method

GRID = Grid(7, 15, 22)  # latent frames, rows, columns: no tile divides it
QUERIES = [(3, 7, 10), (0, 1, 20)]  # in the middle, and at a border
CELL, GAP, LABEL = 7, 10, 16
SEEN, UNSEEN, QUERY, TILE, PAPER = (59, 118, 196), (226, 228, 232), (214, 39, 40), (120, 124, 132), (255, 255, 255)

METHODS: dict[str, Method] = {
    "sta": tilewise.STA(window=(3, 3, 3), tile=(2, 4, 4)),
    "inward": make_method("inward", {"native": (7, 11)}),
    "neighborhood": make_method("neighborhood", {"window": (3, 7, 9)}),
    "neighborhood-dilated": make_method("neighborhood", {"window": (3, 5, 7), "dilation": (1, 2, 2)}),
}


def draw(method: Method) -> Image.Image:
    """Filmstrips of the query's region, one below the other."""
    layout = method.layout(GRID)
    assert layout is not None
    plan = method.plan(layout, 1, torch.device("cpu"))
    width, height = GRID.w * CELL, GRID.h * CELL
    size = (GRID.t * (width + GAP) + GAP, len(QUERIES) * (height + GAP) + LABEL)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    for t in range(GRID.t):
        pen.text((GAP + t * (width + GAP), 3), f"latent frame {t}", fill=TILE)
    for row, query in enumerate(QUERIES):
        region = region_of_query(plan, layout, query, 0)
        for t in range(GRID.t):
            left, top = GAP + t * (width + GAP), LABEL + row * (height + GAP)
            for h in range(GRID.h):
                for w in range(GRID.w):
                    colour = QUERY if (t, h, w) == query else SEEN if region[t, h, w] else UNSEEN
                    x, y = left + w * CELL, top + h * CELL
                    pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour)
            if not isinstance(method, tilewise.STA):
                continue
            for h in range(0, GRID.h, layout.tile[1]):
                pen.line((left, top + h * CELL - 1, left + width - 2, top + h * CELL - 1), fill=TILE)
            for w in range(0, GRID.w, layout.tile[2]):
                pen.line((left + w * CELL - 1, top, left + w * CELL - 1, top + height - 2), fill=TILE)
    return picture.quantize(16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where NAME.png are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in METHODS.items():
        draw(method).save(folder / f"method-{name}.png", optimize=True)
        print(folder / f"method-{name}.png")
