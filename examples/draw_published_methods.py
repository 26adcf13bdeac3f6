"""Draw what one query sees under each method from the literature: the pictures of docs/published-methods.md.

    python -m examples.draw_published_methods docs/images

Queries and keys are those of a clip of the bundled model, of one block at one step. The upper row is one head, the lower another;
colours as in draw_methods.py.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.attention_error import activations
from examples.draw_methods import GAP, LABEL, PAPER, TILE, draw_frame
from tilewise.kernels.plans.layout import Grid, Layout
from tilewise.pipelines.loading.load import load_pipeline
from tilewise.plugins.methods.base import DynamicMethod, Planned, about_methods, make_method, method_class
from tilewise.plugins.methods.dynamic.reordered import HeadOrders

SIZE, FRAMES, BLOCK = 128, 17, 4
DENSITY, HEADS, CELL = 0.2, (0, 2), 4
PLAIN = {"delta"}  # keeps what its base does


def seen(planned: Planned, layout: Layout, query: int, head: int) -> torch.Tensor:
    """(S,) bool in the model's order: the tokens that a query, numbered in that order, sees."""
    plan, place = planned.plan, int(layout.inverse[query])
    keys = torch.arange(layout.grid.tokens)
    if isinstance(planned.around, HeadOrders):
        heads = planned.around.query.shape[1] // planned.around.key.shape[1]
        place = int((planned.around.query[0, head] == place).nonzero())
        keys = planned.around.key[0, head // heads]
    block = int((plan.q_start <= place).sum()) - 1
    lists = plan.sets_of_heads(max(HEADS) + 1)[head] if plan.sets > 1 else 0
    found = torch.zeros(layout.grid.tokens, dtype=torch.bool)
    for number in plan.index[0, lists, block, : int(plan.ends[0, lists, block, 2])].tolist():
        start = int(plan.k_start[number])
        found[keys[start : start + int(plan.k_rows[number])]] = True
    return found[layout.inverse]


def strips(grid: Grid, query: tuple[int, int, int], regions: list[torch.Tensor]) -> Image.Image:
    """A filmstrip for each of the regions, (S,) bool, one below the other."""
    width, height = grid.w * CELL, grid.h * CELL
    picture = Image.new("RGB", (grid.t * (width + GAP) + GAP, len(regions) * (height + GAP) + LABEL), PAPER)
    pen = ImageDraw.Draw(picture)
    for t in range(grid.t):
        left = GAP + t * (width + GAP)
        pen.text((left, 3), f"latent frame {t}", fill=TILE)
        for row, region in enumerate(regions):
            corner = left, LABEL + row * (height + GAP)
            draw_frame(pen, corner, region.view(grid.shape)[t], query[1:] if t == query[0] else None, CELL)
    return picture.quantize(16)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    grid, calls = activations(load_pipeline("demo", device="cpu"), SIZE, FRAMES, {BLOCK})
    call = calls[0]
    query = (grid.t // 2, grid.h // 2, grid.w // 2)
    number = (query[0] * grid.h + query[1]) * grid.w + query[2]
    for about in about_methods():
        if ".published." not in method_class(about.name).__module__ or about.name in PLAIN:
            continue
        method = make_method(about.name, {"density": DENSITY})
        layout = method.layout(grid)
        assert layout is not None
        q, k, v = (x[:1, layout.permutation].float() for x in (call.query, call.key, call.value))
        if isinstance(method, DynamicMethod):
            planned = method.plan_call(layout, q, k, v, q.shape[-1] ** -0.5, {}, 0)
        else:
            planned = Planned(method.plan(layout, q.shape[2], q.device))
        path = folder / f"method-{about.name}.png"
        strips(grid, query, [seen(planned, layout, number, head) for head in HEADS]).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where method-NAME.png are written")
    with torch.inference_mode():
        main(parser.parse_args().folder)
