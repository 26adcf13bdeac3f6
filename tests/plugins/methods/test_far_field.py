"""The far field of windows: against a softmax over keys and means written out, and on patched denoisers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import every_family
import family_checks
import pytest
import torch
from diffusers import UNet2DConditionModel

import tilewise
from tilewise.kernels.plans.layout import Grid
from tilewise.plugins.errors import ConfigError
from tilewise.plugins.masks.padding_mask import Group
from tilewise.plugins.methods.base import Planned, make_method
from tilewise.plugins.methods.draft import Draft
from tilewise.plugins.methods.inward import Inward
from tilewise.plugins.methods.neighborhood import Neighborhood
from tilewise.plugins.methods.sta import STA
from tilewise.plugins.runtime.sparse_call import Part, choose, run_part

SMALL = Grid(2, 6, 7)
METHODS = [
    (SMALL, STA(window=(1, 1, 3), tile=(2, 3, 2), far="cells")),
    (SMALL, STA(window=((1, 1, 1), (1, 2, 1)), tile=(2, 3, 4), far="tiles")),
    (Grid(2, 4, 6, text=5), STA(window=(1, 1, 1), tile=(2, 2, 3), far="cells", cell=(2, 1, 2))),
    (Grid(2, 4, 6, text=5, text_first=True, opposite=2), STA(window=(1, 1, 1), tile=(2, 2, 3), far="tiles")),
    (Grid(2, 15, 16), Neighborhood(window=(1, 3, 3), far="cells")),
    (Grid(2, 15, 16), Inward(native=(2, 2), far="tiles")),
]


@pytest.mark.parametrize(("grid", "method"), METHODS, ids=str)
def test_one_softmax_over_keys_and_means(grid, method):
    layout, heads, scale = method.layout(grid), 2, 0.3
    plan = method.plan(layout, heads, torch.device("cpu"))
    assert plan.far is not None
    q, k, v = (torch.randn(2, grid.tokens, n, 8) for n in (heads, 1, 1))
    choice, _ = choose((q, k, v), plan, None)
    got = run_part((q, k, v), Part(Group(None, None, 0), layout, Planned(plan), choice), scale)

    mask, cells = plan.to_mask(heads)[0], list(zip(layout.cell_start.tolist(), layout.cell_rows.tolist(), strict=True))
    keys, values = (
        torch.cat([x[:, :, 0], torch.stack([x[:, s : s + n, 0].mean(1) for s, n in cells], 1)], 1).double()
        for x in (k, v)
    )
    block = torch.repeat_interleave(layout.block_rows)
    want = torch.empty_like(q, dtype=torch.float64)
    for h in range(heads):
        for i in range(grid.tokens):
            # Means of what no query of the block sees, weighed by how many tokens that is. `bias` is tested with the cells.
            bias = plan.far.bias[plan.sets_of_heads(heads)[h], block[i]].double()
            weight = torch.cat([torch.zeros(grid.tokens).masked_fill(~mask[h, i], -math.inf).double(), bias])
            scores = scale * torch.einsum("bd,bkd->bk", q[:, i, h].double(), keys) + weight
            want[:, i, h] = torch.einsum("bk,bkd->bd", scores.softmax(-1), values)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["HunyuanVideo, one stream", "SkyReels-V2", "Flux, reference image", "Mochi"])
def test_means_of_single_tokens_are_dense_attention(name):
    """With cells of one token nothing is approximated: a window of one tile gives stock's output, text and padding included."""
    case = every_family.CASES[name]
    model = case.make()
    inputs = case.inputs(model)
    stock = family_checks.forward(model, inputs)
    narrow = STA(window=(1, 1, 1), tile=(2, 3, 3))
    with tilewise.patched(model, narrow, steps=(0, 1), strict=True):
        assert (family_checks.forward(model, inputs) - stock).abs().max() > 1e-3  # the window alone matters
    with tilewise.patched(model, dataclasses.replace(narrow, far="cells", cell=(1, 1, 1)), steps=(0, 1), strict=True):
        torch.testing.assert_close(family_checks.forward(model, inputs), stock, atol=2e-5, rtol=2e-5)
        summary = tilewise.summary(model)
        assert summary.cost == pytest.approx(1.0) and summary.density < 0.9
        assert summary.to_dict()["cost"] == summary.cost and "cost" in str(summary)


def test_means_of_single_tokens_are_dense_attention_on_feature_maps():
    """The same on a UNet, whose layers have maps of several sizes."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=24, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 24, 20), "timestep": torch.tensor(7), "encoder_hidden_states": torch.randn(2, 5, 32)
    }  # fmt: skip
    narrow = STA(window=(1, 1, 1), tile=(1, 4, 4))
    options: dict[str, Any] = {"steps": (0, 1), "min_tokens": 0, "strict": True}
    with torch.no_grad():
        stock = model(**inputs).sample
        with tilewise.patched(model, narrow, **options):
            assert (model(**inputs).sample - stock).abs().max() > 1e-3
        with tilewise.patched(model, dataclasses.replace(narrow, far="cells", cell=(1, 1, 1)), **options):
            torch.testing.assert_close(model(**inputs).sample, stock, atol=2e-5, rtol=2e-5)
            assert tilewise.summary(model).density < 0.9


def test_cost_is_known_before_and_counted_after(tiny_pipe):
    method = STA(window=(1, 1, 1), tile=(3, 4, 4), far="tiles")
    size = {"height": 64, "width": 64, "num_frames": 9}
    explained = tilewise.explain(tiny_pipe, **size, method=method)
    assert explained.density < explained.cost < 1.1 * explained.density + 0.1
    tilewise.patch(tiny_pipe, method, steps=(0, 1))
    tiny_pipe("a", **size, num_inference_steps=1, output_type="latent", max_sequence_length=16)
    summary = tilewise.summary(tiny_pipe)
    assert summary.cost == pytest.approx(explained.cost) and summary.density == pytest.approx(explained.density)
    # A dynamic method has a mean for each block that it skips.
    draft = Draft(density=0.25, tile=(1, 4, 4), min_tokens=0)
    tilewise.patch(tiny_pipe, draft, steps=(0, 1))
    tiny_pipe("a", **size, num_inference_steps=1, output_type="latent", max_sequence_length=16)
    summary = tilewise.summary(tiny_pipe)
    assert summary.cost == pytest.approx(summary.density + (1 - summary.density) / 16, abs=1e-6)


def test_a_cell_that_does_not_fit_its_tile(tiny_pipe):
    with pytest.raises(ConfigError, match=r"a cell of \(3, 2, 2\) tokens does not fit into a tile of \(2, 4, 4\)"):
        STA(window=(1, 1, 1), tile=(2, 4, 4), far="cells", cell=(3, 2, 2))
    told = tilewise.explain(
        tiny_pipe, height=64, width=64, num_frames=9, method=STA(window=(1, 1, 1), far="cells", cell=(9, 1, 1))
    )
    (t, *_) = told.rows[0].tile
    assert told.rows[0].options["far field"] == f"means of {t}×1×1: cell 9×1×1 cut to the tile" and t < 9


def test_within_a_dynamic_method():
    """``within`` hides what is outside its window; with a far field, the tiles out there are means, as skipped ones are."""
    grid = Grid(2, 8, 8)
    q, k, v = (torch.randn(1, 128, 2, 8) for _ in range(3))
    found = {}
    for far in (None, "tiles"):
        method = Draft(density=0.1, tile=(2, 2, 2), min_tokens=0, within=STA(window=(1, 1, 1), far=far))
        layout = method.layout(grid)
        found[far] = method.plan_call(layout, q, k, v, 8**-0.5, {}, 0)
        assert torch.equal(found[far].plan.ends, found[None].plan.ends)
    assert found[None].compensation.bias.isneginf().all()  # the window is one tile, which is seen
    assert found["tiles"].compensation.bias.isneginf().sum() == 2 * layout.blocks
    for bad in ({"within": STA(far="cells")}, {"within": STA(far="tiles"), "compensate": False}):
        with pytest.raises(ConfigError, match="far='tiles' and leave compensate on"):
            Draft(**bad)


def test_saved_and_read_again(tmp_path):
    config = tilewise.Config(STA(window=(1, 3, 3), far="cells", cell=(1, 2, 2)))
    tilewise.save_config(config, tmp_path / "far.json")
    assert tilewise.load_config(tmp_path / "far.json") == config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sta", {"far": "blocks"}, "far must be 'cells', 'tiles' or None"),
        ("sta", {"cell": (1, 2, 2)}, "an option of far='cells'"),
        ("inward", {"far": "tiles", "cell": (1, 2, 2)}, "an option of far='cells'"),
        ("sta", {"far": "cells", "cell": (0, 2, 2)}, "three whole numbers of at least 1"),
        ("neighborhood", {"far": "cells", "causal": True}, "causal=False"),
        ("neighborhood", {"far": "tiles", "dilation": (1, 2, 2)}, "dilation \\(1, 1, 1\\)"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_method(name, options)
