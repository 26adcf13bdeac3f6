"""``draw_published_methods.py``: the pictures of methods from the literature show the tokens that the plan shows."""

import sys
from pathlib import Path

import pytest
import torch
from chosen_blocks import planned, tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.draw_published_methods import seen
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.methods.base import make_method


@pytest.mark.parametrize("name", ["sol", "svg2"])
def test_a_query_sees_what_the_plan_says(name):
    grid = Grid(2, 9, 14)
    method = make_method(name, {"tile": (1, 4, 4), "density": 0.3})
    layout = method.layout(grid)
    found = planned(method, layout, *tensors(grid, batch=1))
    mask = found.plan.to_mask(4)[0]
    for head in (0, 2):
        shown = torch.zeros_like(mask[head])
        orders = [torch.arange(grid.tokens)] * 2
        if found.around is not None:
            orders = [found.around.query[0, head], found.around.key[0, head // 2]]
        shown[orders[0][:, None], orders[1][None, :]] = mask[head]  # in the layout's order
        for query in (0, 100, 251):
            wanted = shown[layout.inverse[query]][layout.inverse]
            assert torch.equal(seen(found, layout, query, head), wanted)
